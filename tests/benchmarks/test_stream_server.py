"""The bare stream: what a client gets back is what it has sent."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from benchmarks.servers import LOCAL_HOST, free_port, server
from benchmarks.workers.lines import ROOT
from benchmarks.workers.stream_server import DONE, GET, PUT, receive


def test_what_was_sent_comes_back(tmp_path: Path) -> None:
    port, sent = free_port(), os.urandom(3 << 20)
    command = [sys.executable, "-m", "benchmarks.workers.stream_server", port, len(sent)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with server(command, (LOCAL_HOST, port), tmp_path / "log", env):
        for _ in range(2):  # it stays for the next client
            with socket.create_connection((LOCAL_HOST, port)) as sock:
                sock.sendall(PUT + sent)
                assert sock.recv(1) == DONE
                sock.sendall(GET)
                got = bytearray(len(sent))
                receive(sock, memoryview(got))
                assert got == sent


def test_a_stream_that_ends_early_is_no_full_one() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"half")
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError, match="ended"):
            receive(ours, memoryview(bytearray(8)))

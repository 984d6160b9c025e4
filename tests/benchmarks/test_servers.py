"""Servers that come up, that do not, and that are gone afterwards."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

import kvstore
from benchmarks.servers import LOCAL_HOST, ServerError, daemon, free_port, server

LISTEN = "import socket, sys; s = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
FOREVER = "while True: s.accept()"


def test_a_server_listens_while_it_is_needed_and_no_longer(tmp_path: Path) -> None:
    address = (LOCAL_HOST, free_port())
    command = [sys.executable, "-c", LISTEN + FOREVER, address[1]]
    with server(command, address, tmp_path / "log"), socket.create_connection(address):
        pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('one'); sys.exit('no such disk')"]
    expected = pytest.raises(ServerError, match="does not start: no such disk")
    with expected, server(command, str(tmp_path / "socket"), tmp_path / "log"):
        pass


def test_the_daemon_that_is_measured_is_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_NVME_PATH", str(tmp_path / "not this"))
    with daemon(tmp_path, 64 << 20) as path, kvstore.connect(f"unix://{path}") as client:
        assert client.stats().ram["capacity_bytes"] == 64 << 20
    assert not path.exists()
    assert not (tmp_path / "not this").exists()

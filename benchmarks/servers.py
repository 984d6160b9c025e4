"""Servers that are measured: processes of ours, waited for until they listen, ended by us."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.workers.lines import ROOT

START_S = 60.0  # by then a server listens
END_S = 30.0  # after SIGTERM
LOCAL_HOST = "127.0.0.1"

Address = str | tuple[str, int]  # of a Unix socket, or of a TCP port


class ServerError(Exception):
    """A server did not come up."""


@contextmanager
def server(
    command: Sequence[object],
    address: Address,
    log: Path,
    env: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """`command` runs, in the folder of its log, and listens at `address`.

    `env` is the whole of its environment; ours without one. Raises ServerError.
    """
    words = [str(word) for word in command]
    with log.open("wb") as out:
        process = subprocess.Popen(
            words,
            cwd=log.parent,
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline_s = time.monotonic() + START_S
        while not _listens(address):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise ServerError(f"{Path(words[0]).name} does not start: {_last_line(log)}")
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def daemon(directory: Path, ram_bytes: int, port: int | None = None) -> Iterator[Path]:
    """A `kvstore daemon` with only RAM; gives its socket. Nobody's settings but these reach it.

    With `port`, it listens there for TCP, too.
    """
    path = directory / "kvstore.sock"
    command: list[object] = [sys.executable, "-m", "kvstore", "daemon", "--socket", path]
    command += ["--ram-bytes", ram_bytes]
    address: Address = str(path)
    if port is not None:
        address = (LOCAL_HOST, port)
        command += ["--listen", f"{LOCAL_HOST}:{port}"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}
    env |= {"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(directory)}
    with server(command, address, directory / "daemon.log", env):
        yield path


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as bound:
        bound.bind((LOCAL_HOST, 0))
        port: int = bound.getsockname()[1]
        return port


def _listens(address: Address) -> bool:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as probe:
        return probe.connect_ex(address) == 0


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"

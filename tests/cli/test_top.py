"""`kvstore top`: one look for scripts, and live in a real terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvstore
from kvstore.cli.top import compare
from tests.cli.commands import Done, environment, fill, namespace
from tests.cli.test_bad_input import refused
from tests.daemon.doors import DaemonProcess


@pytest.fixture
def process(tmp_path: Path) -> Iterator[DaemonProcess]:
    nvme = ("--nvme-path", str(tmp_path / "nvme"), "--nvme-bytes", "8 MiB")
    with DaemonProcess(tmp_path, "--ram-bytes", "1 MiB", *nvme) as process:
        yield process


def test_one_look(here: Callable[..., Done], process: DaemonProcess) -> None:
    with process.connect() as client:
        fill(client, 8)
        assert client.flush()
        chain = kvstore.TokenChain(namespace(), range(16 * 10)).chain()
        with client.acquire(chain) as lease:
            assert lease.wait() == 8
        asked = ("top", "--once", "--interval", "10ms", "--store", process.url)
        look = here(*asked, "--json").data
        plain = here(*asked)
    assert (look["store"], look["pid"]) == (process.url, process.pid)
    assert look["tiers"]["ram"] == {
        "blocks": 8,
        "used_bytes": 8 * 8192,
        "capacity_bytes": 1 << 20,
    }
    assert look["hit_rate"] is None  # nobody asked meanwhile
    assert look["hit_rate_ever"] == {"ram": 0.8}
    assert look["misses_ever"] == {"absent": 2}
    assert look["queues"] == {"demotion_blocks": 0, "promotion_bytes": 0}
    assert len(look["sessions"]) == 2
    assert look["interval_s"] > 0
    assert plain.status == 0
    for text in ("RAM", "NVMe", "80.0%", "2 absent", "local"):
        assert text in plain.stdout


def test_rates_are_of_the_interval() -> None:
    def sample(at_s: float, hits: int, missed: int, served_bytes: int) -> dict[str, object]:
        tier = {"blocks": 1, "used_bytes": 2, "capacity_bytes": 3, "more": 4}
        return {
            **{"version": "1", "pid": 1, "uptime_s": at_s, "sessions": [], "queues": {}},
            **{"ram": tier, "nvme": {}, "at_s": at_s, "hits": {"ram": hits}},
            **{"misses": {"absent": missed}, "counters": {"served_bytes": served_bytes}},
        }

    look = compare("here", sample(10.0, 100, 0, 0), sample(12.0, 130, 10, 4096))
    assert look["asked_blocks_per_s"] == 20.0
    assert look["hit_rate"] == {"ram": 0.75}
    assert look["hit_rate_ever"] == {"ram": 130 / 140}
    assert look["misses"] == {"absent": 10}
    assert look["bytes_per_s"]["served"] == 2048.0
    assert look["tiers"] == {"ram": {"blocks": 1, "used_bytes": 2, "capacity_bytes": 3}}


@pytest.mark.parametrize("how", ["q", "interrupt", "killed"])
def test_live_in_a_terminal(home: Path, process: DaemonProcess, how: str) -> None:
    """Drawn until q or Ctrl-C, or the daemon goes; the terminal is left as it was."""
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    command = [sys.executable, "-m", "kvstore", "top", "--interval", "20ms"]
    with subprocess.Popen(
        [*command, "--store", process.url],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment(home, TERM="xterm", COLUMNS="100", LINES="40"),
        text=True,
    ) as top:
        shown = b""
        while shown.count(b"asked for") < 3:
            shown += os.read(ours, 65536)
        if how == "q":
            os.write(ours, b"q")
        elif how == "interrupt":
            top.send_signal(signal.SIGINT)
        else:
            process.kill()
        while top.poll() is None:  # it may have more to show than the terminal holds
            if select.select([ours], [], [], 0.02)[0]:
                os.read(ours, 65536)
        assert top.stderr is not None
        said = top.stderr.read()
    assert (top.returncode, said.count("\n")) == ((1, 1) if how == "killed" else (0, 0)), said
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


def test_json_is_one_look(here: Callable[..., Done], process: DaemonProcess) -> None:
    done = here("top", "--json", "--interval", "10ms", "--store", process.url)
    assert (done.status, done.data["pid"]) == (0, process.pid)


def test_bad_input(here: Callable[..., Done], process: DaemonProcess) -> None:
    refused(here("top"), "no daemon is running here: give its URL as --store")
    refused(here("top", "--set", "nvme.path=/nowhere"), "no daemon is running here")
    refused(here("top", "--store", process.url), "this needs a terminal; --once")
    refused(here("top", "--once", "--interval", "0", "--store", process.url), "--interval '0'")
    refused(here("top", "somewhere"), "unexpected extra argument")
    away = here("top", "--once", "--store", "unix:///nowhere")
    assert (away.status, away.stdout, away.stderr.count("\n")) == (1, "", 1)

"""How a command ends that is told to: as cleanly as after Ctrl-C, in real processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.commands import Done, environment

PROMPT = "It was a dark and stormy night; the rain fell in torrents. " * 4
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@contextmanager
def speaking(
    home: Path, *args: str, stdin: bytes = b"", before: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process of its own, in the middle of its answer."""
    command = [*before, sys.executable, "-m", "kvstore", *args, "--max-tokens", "16000"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=home,
        env=environment(home),
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(stdin)
        process.stdin.flush()
        try:
            assert len(process.stdout.read(10)) == 10
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", STATUS)
def test_queued_writes_reach_the_drive(
    home: Path, here: Callable[..., Done], model: Path, number: signal.Signals
) -> None:
    nvme = ("--nvme-path", "blocks", "--nvme-bytes", "16 MiB")
    with speaking(home, "generate", "--model", str(model), *nvme, PROMPT) as process:
        process.send_signal(number)
        _, stderr = process.communicate()
    assert (process.returncode, stderr) == (STATUS[number], b"")
    again = here("generate", "--model", model, *nvme, "--max-tokens", "1", "--json", PROMPT)
    assert again.data["usage"]["nvme_tokens"] == (len(PROMPT) - 1) // 16 * 16


def test_a_chat_keeps_what_was_said(home: Path, model: Path) -> None:
    with speaking(home, "chat", "--model", str(model), stdin=b"Tell me everything.\n") as process:
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate()
    assert (process.returncode, stderr) == (143, b"")
    path = home / ".local" / "state" / "kvstore" / "chats" / "default.json"
    messages = json.loads(path.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]


def test_nohup_is_respected(home: Path, model: Path) -> None:
    asked = ("generate", "--model", str(model), PROMPT)
    with speaking(home, *asked, before=("nohup",)) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGHUP)
        assert len(process.stdout.read(100)) == 100
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 143


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("args", [("settings",), ("settings", "--json"), ("--help",)])
def test_output_that_cannot_be_written(home: Path, args: tuple[str, ...], unbuffered: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvstore", *args],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(home, PYTHONUNBUFFERED=unbuffered),
            cwd=home,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == ("kvstore: standard output cannot be written: No space left on device\n")

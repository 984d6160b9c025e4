"""`kvstore chat`: a conversation survives leaving, in real processes with piped input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.cli.commands import environment, kvstore


def saved(home: Path, name: str) -> dict[str, Any]:
    path = home / ".local" / "state" / "kvstore" / "chats" / f"{name}.json"
    conversation: dict[str, Any] = json.loads(path.read_text())
    return conversation


def test_a_conversation_survives_leaving_and_coming_back(home: Path, model: Path) -> None:
    blocks = ("--nvme-path", "blocks", "--nvme-bytes", "16 MiB", "--max-tokens", "5")
    lines = "I am Ada.\n\n/history\n/exit\nnever read\n"
    first = kvstore(home, "chat", "ada", "--model", str(model), *blocks, stdin=lines)
    assert (first.status, first.stderr) == (0, "")
    messages = saved(home, "ada")["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "I am Ada."
    answer = messages[1]["content"]
    assert first.stdout == f"{answer}\nuser: I am Ada.\nassistant: {answer}\n"

    # No --model: the conversation knows with whom it is. Its end is the end of input.
    second = kvstore(home, "chat", "ada", *blocks, stdin="Who am I?\n")
    assert (second.status, second.stderr) == (0, "")
    later = saved(home, "ada")["messages"]
    assert later[:2] == messages
    assert [message["content"] for message in later[2:]] == ["Who am I?", second.stdout[:-1]]

    third = kvstore(home, "chat", "ada", stdin="/reset\n/history\n")
    assert (third.status, third.stdout) == (0, "")
    assert saved(home, "ada") == {"format": 1, "model": str(model.resolve()), "messages": []}


def test_ctrl_c_ends_an_answer_and_then_the_chat(home: Path, model: Path) -> None:
    """What was said of the answer is kept."""
    command = [sys.executable, "-m", "kvstore", "chat", "--model", str(model)]
    with subprocess.Popen(
        [*command, "--max-tokens", "16000", "--system", "Be long."],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=home,
        env=environment(home),
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        assert chat.stderr is not None
        chat.stdin.write(b"Tell me everything.\n")
        chat.stdin.flush()
        begun = chat.stdout.read(10)  # it is in the middle of its answer
        chat.send_signal(signal.SIGINT)
        chat.stdin.write(b"/history\n")
        chat.stdin.close()
        shown = (begun + chat.stdout.read()).decode()
        assert chat.stderr.read() == b""
        assert chat.wait() == 0
    messages = saved(home, "default")["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    said = messages[-1]["content"]
    assert 0 < len(said.encode()) < 16_000
    history = f"system: Be long.\nuser: Tell me everything.\nassistant: {said}\n"
    assert shown == f"{said}\n{history}"


def test_bad_input_ends_a_piped_chat(home: Path, model: Path) -> None:
    """And leaves the conversation as it was."""
    done = kvstore(home, "chat", "--model", str(model), stdin="x" * 20_000 + "\n")
    assert done.status == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "the prompt has 20003 tokens" in done.stderr
    assert not (home / ".local").exists()
    assert kvstore(home, "chat", "../x", "--model", str(model)).status == 2

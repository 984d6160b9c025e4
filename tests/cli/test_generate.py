"""`kvstore generate`: what it prints, where prompts come from, what a second run finds."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import Done, environment, kvstore
from tests.cli.test_bad_input import refused
from tests.daemon.doors import DaemonProcess

PROMPT = "It was a dark and stormy night; the rain fell in torrents. " * 4


@pytest.fixture
def generate(here: Callable[..., Done], model: Path) -> Callable[..., Done]:
    return lambda *args: here("generate", "--model", model, "--max-tokens", "6", *args)


def came_from(done: Done) -> dict[str, int]:
    usage: dict[str, Any] = done.data["usage"]
    places = ("hbm", "ram", "nvme", "remote", "recomputed")
    tokens = {place: usage[f"{place}_tokens"] for place in places}
    assert sum(tokens.values()) == usage["prompt_tokens"]
    return tokens


def test_the_text_is_what_json_says(generate: Callable[..., Done]) -> None:
    plain, data = generate(PROMPT), generate(PROMPT, "--json")
    assert plain.status == data.status == 0
    assert plain.stderr == data.stderr == ""
    (completion,) = data.data["completions"]
    assert plain.stdout == completion["text"] + "\n"
    assert len(completion["token_ids"]) == data.data["usage"]["completion_tokens"]


def test_the_next_command_finds_what_was_computed(
    generate: Callable[..., Done], tmp_path: Path
) -> None:
    nvme = ("--nvme-path", tmp_path / "blocks", "--nvme-bytes", "16 MiB", "--json")
    first, second = generate(PROMPT, *nvme), generate(PROMPT, *nvme)
    full_blocks = (len(PROMPT) - 1) // 16 * 16
    assert came_from(first)["recomputed"] == len(PROMPT)
    assert came_from(second)["nvme"] == full_blocks
    assert second.data["completions"] == first.data["completions"]
    other_tenant = generate(PROMPT, *nvme, "--set", "tenant.salt=hush")
    assert came_from(other_tenant)["recomputed"] == len(PROMPT)


def test_a_file_comes_before_the_prompt(generate: Callable[..., Done], home: Path) -> None:
    (home / "story.txt").write_text(PROMPT)
    both = generate("--file", "story.txt", "What then?", "--json")
    alone = generate(PROMPT + "\n\nWhat then?", "--json")
    assert both.data["completions"] == alone.data["completions"]


def test_chat_puts_the_prompt_into_the_template(generate: Callable[..., Done]) -> None:
    asked = generate("--chat", "Hello?", "--json").data["usage"]["prompt_tokens"]
    assert asked == len("Hello?") + 3  # the user's mark, the end's, the assistant's


def test_several_answers(generate: Callable[..., Done]) -> None:
    asked = ("-n", "3", "--temperature", "1", "--seed", "7", PROMPT)
    data = generate(*asked, "--json").data
    assert len({tuple(each["token_ids"]) for each in data["completions"]}) > 1
    answers = "".join(f"[{i}] {c['text']}\n" for i, c in enumerate(data["completions"], start=1))
    assert generate(*asked).stdout == answers


def test_the_prompt_comes_from_stdin(home: Path, model: Path) -> None:
    """And settings from the environment; in a process of its own."""
    command = [sys.executable, "-m", "kvstore", "generate", "--max-tokens", "3", "--json"]
    done = subprocess.run(
        command,
        input=PROMPT.encode(),
        capture_output=True,
        cwd=home,
        env=environment(home, KVSTORE_ENGINE__MODEL=str(model), KVSTORE_ENGINE__THREADS="1"),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    usage = Done(0, done.stdout.decode(), "").data["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(PROMPT), 3)


def test_progress_goes_to_a_terminal_and_json_to_stdout(home: Path, model: Path) -> None:
    command = [sys.executable, "-m", "kvstore", "generate", "--model", str(model), "--json"]
    terminal, end = pty.openpty()
    try:
        done = subprocess.run(
            [*command, "--max-tokens", "2", PROMPT],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=end,
            cwd=home,
            env=environment(home, TERM="xterm"),
            check=False,
        )
        shown = os.read(terminal, 1 << 20).decode()
    finally:
        os.close(terminal)
        os.close(end)
    assert done.returncode == 0
    assert Done(0, done.stdout.decode(), "").data["usage"]["completion_tokens"] == 2
    assert "Loading tiny" in shown
    assert "Reading the prompt" in shown


def test_through_a_daemon(
    generate: Callable[..., Done], model: Path, home: Path, tmp_path: Path
) -> None:
    """The next command finds what was computed in the daemon's RAM, also in a terminal."""
    with DaemonProcess(tmp_path, "--ram-bytes", "16 MiB") as process:
        store = ("--store", process.url)
        first, second = generate(PROMPT, *store, "--json"), generate(PROMPT, *store, "--json")
        assert came_from(first)["recomputed"] == len(PROMPT)
        assert came_from(second)["ram"] == (len(PROMPT) - 1) // 16 * 16
        assert second.data["completions"] == first.data["completions"]
        assert first.stderr == second.stderr == ""
        chat = ("chat", "ada", "--model", str(model), "--max-tokens", "2", *store)
        assert kvstore(home, *chat, stdin=PROMPT).status == 0
        process.kill()
        assert generate(PROMPT, *store).stdout == generate(PROMPT).stdout


def test_a_daemon_that_is_away(home: Path, model: Path) -> None:
    """A line that says so, and the answer all the same."""
    asked = ("--model", str(model), "--max-tokens", "6", "--store", "unix:///nowhere")
    warning = (
        "kvstore: unix:///nowhere cannot be reached: [Errno 2] No such file or directory; "
        "going on without it\n"
    )
    done = kvstore(home, "generate", PROMPT, *asked, "--json")
    assert (done.status, done.stderr) == (0, warning)
    assert came_from(done)["recomputed"] == len(PROMPT)
    talked = kvstore(home, "chat", *asked, stdin="hello\n")
    assert (talked.status, talked.stderr) == (0, warning)


def test_a_daemon_and_a_store_of_its_own(here: Callable[..., Done], home: Path) -> None:
    url = "unix:///run/kvstore.sock"
    for flag in ("--ram-bytes", "--nvme-bytes"):
        done = here("generate", "hello", "--store", url, flag, "1 GiB")
        refused(done, f"{flag} and --store do not go together: the daemon has tiers of its own")
    refused(here("chat", "--store", url, "--nvme-path", "x"), "--nvme-path and --store do not go")
    refused(here("generate", "hi", "--store", url, "--set", "store.verify=always"), "store.verify")
    (home / "kvstore.toml").write_text(f'[engine]\nstore = "{url}"\n[nvme]\npath = "x"\n')
    refused(
        here("generate", "hi", "--ram-bytes", "1 GiB"), f"--ram-bytes and engine.store {url} do"
    )
    # A file may be the daemon's as well as its clients'.
    refused(here("generate", "hi"), "which model?")


def test_what_names_no_daemon(here: Callable[..., Done], model: Path) -> None:
    for url in ("unix://run/x", "http://localhost", "", "kvstore://", "kvstore://h:70000"):
        done = here("generate", "hi", "--model", model, "--store", url)
        refused(done, f"{url!r} names no daemon", "give unix:///path/to/socket or kvstore://host")

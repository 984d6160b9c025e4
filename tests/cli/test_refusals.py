"""What would be dropped without a word, or end in a kill, is refused in one line instead."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.machine import memory_bytes
from tests.cli.commands import Done, environment
from tests.cli.test_bad_input import as_somebody, refused


def test_ram_and_hbm_must_fit_together(here: Callable[..., Done]) -> None:
    most = str(memory_bytes() * 6 // 10)
    done = here("generate", "--ram-bytes", most, "--hbm-bytes", most, "--model", "nowhere", "hi")
    refused(done, "--ram-bytes", "--hbm-bytes", "together more than", "of memory here")


def test_a_system_text_for_a_conversation_that_has_begun(
    here: Callable[..., Done], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chat(*args: str) -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello?\n")))
        return here("chat", "ada", "--model", model, "--max-tokens", "2", *args)

    assert chat("--system", "Be brief.").status == 0
    assert chat("--system", "Be brief.").status == 0  # as it was told
    refused(chat("--system", "Be long."), "'ada' exists", "--system")
    assert chat().status == 0


def piped(home: Path, text: bytes, *args: str) -> Done:
    """`kvstore generate args`, with the text in the pipe before the command begins."""
    end, source = os.pipe()
    os.write(source, text)
    os.close(source)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kvstore", "generate", *args],
            stdin=end,
            capture_output=True,
            text=True,
            cwd=home,
            env=environment(home),
            check=False,
        )
    finally:
        os.close(end)
    return Done(done.returncode, done.stdout, done.stderr)


def test_text_on_stdin_besides_the_prompt(home: Path, model: Path) -> None:
    asked = ("--model", str(model), "--max-tokens", "1", "--json")
    refused(piped(home, b"hi", *asked, "and"), "text on stdin", "--file /dev/stdin")
    both = piped(home, b"hi", *asked, "--file", "/dev/stdin", "and")
    assert both.data["usage"]["prompt_tokens"] == len("hi\n\nand")
    assert piped(home, b"", *asked, "and").data["usage"]["prompt_tokens"] == len("and")


def test_models_that_are_none(here: Callable[..., Done], home: Path) -> None:
    model = home / "model"
    model.mkdir()
    asked = ("generate", "--model", model, "hi")
    refused(here(*asked), f"{model} holds no model: neither config.json nor a GGUF file")
    (model / "tiny.gguf").write_bytes(b"")
    refused(here(*asked), f"{model} has no config.json", f"give {model / 'tiny.gguf'}")
    (model / "config.json").write_text('{"model_type": "llama"}')
    refused(here(*asked), "config.json has no field 'num_attention_heads'")


def test_a_config_file_that_is_closed(home: Path, tmp_path: Path) -> None:
    """One line of advice; in a folder that is closed to us there is none, unless it was named."""
    folder = home / ".config" / "kvstore"
    folder.mkdir(parents=True)
    config = folder / "config.toml"
    config.write_text("")
    config.chmod(0)
    refused(as_somebody(home, tmp_path, "settings"), f"{config}: cannot be read", "chmod u+r")
    folder.chmod(0)
    try:
        assert as_somebody(home, tmp_path, "settings").status == 0
        named = as_somebody(home, tmp_path, "settings", "--config", config)
        refused(named, f"{config}: cannot be read", "--config")
    finally:
        folder.chmod(0o700)


def test_a_model_cache_that_is_closed(home: Path, tmp_path: Path) -> None:
    cache = home / ".cache"
    cache.mkdir()
    cache.chmod(0)
    try:
        refused(
            as_somebody(home, tmp_path, "generate", "--model", "smollm2", "hi"),
            f"the model cannot be kept in {cache / 'kvstore' / 'models'}",
        )
    finally:
        cache.chmod(0o700)


def test_a_device_that_is_not_here(here: Callable[..., Done], model: Path) -> None:
    done = here("generate", "--device", "cuda:99", "--model", str(model), "hi")
    refused(done, "device cuda:99", "torch")
    done = here("generate", "--device", "abacus", "--model", str(model), "hi")
    refused(done, "'abacus' is not one of cpu, cuda")

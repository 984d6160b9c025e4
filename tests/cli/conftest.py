"""Fixtures of the command line's tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstore.cli.main import run
from tests.cli.commands import Done
from tests.engine.tiny import tiny_model


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty home directory, so that nobody's settings and conversations get in the way."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def here(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Run a command in this process, in that home; torch is imported once for all tests."""
    for name in list(os.environ):
        if name.startswith(("KVSTORE_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)

    def command(*args: str | Path) -> Done:
        capsys.readouterr()
        status = run([str(arg) for arg in args])
        return Done(status, *capsys.readouterr())

    return command


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with room for the demo's document, a token a byte."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return tiny_model(folder, max_position_embeddings=16_384)

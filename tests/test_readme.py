"""The Python in the README runs, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.engine.tiny import tiny_model

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


def test_the_engine_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(tmp_path / "model")
    named = {
        "./Llama-3.2-1B": str(model),
        "/mnt/cache": str(tmp_path / "cache"),
        "10 GiB": "16 MiB",
        "1 GiB": "16 MiB",
    }
    snippet = SNIPPETS[0]
    for there, here in named.items():
        assert there in snippet
        snippet = snippet.replace(there, here)
    run(snippet)
    assert "recomputed" in capsys.readouterr().out


def test_the_store_alone(capsys: pytest.CaptureFixture[str]) -> None:
    run(SNIPPETS[1])
    assert capsys.readouterr().out == "all 6 blocks are held\n"
    assert len(SNIPPETS) == 2

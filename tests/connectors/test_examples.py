"""The examples run, as a reader would run them."""

from __future__ import annotations

import io
import re
import runpy
from pathlib import Path

import pytest
from transformers.utils import logging

from tests.engine.tiny import tiny_model

# Progress bars would take a lock that is shared memory.
logging.disable_progress_bar()

CHAT = Path(__file__).parents[2] / "examples" / "transformers_chat.py"
TYPED = "What is stored is not computed again, is it?\nAnd what is not stored?\n"


def test_a_chat_goes_on_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(tmp_path / "model")
    monkeypatch.setattr("sys.argv", [str(CHAT), str(model), str(tmp_path / "cache")])
    answers, loaded = [], []
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO(TYPED))
        runpy.run_path(str(CHAT), run_name="__main__")
        printed = capsys.readouterr().out
        answers.append(re.findall("model: (.*)", printed))
        said = re.search(r"(\d+) of (\d+) tokens of prompts were loaded", printed)
        assert said is not None, printed
        loaded.append(int(said[1]) / int(said[2]))
    assert answers[0] == answers[1]
    assert len(answers[0]) == 2
    # At first the second question found the first one; after the restart that was there, too. Of
    # the rest, what is quicker to compute than to read, for so small a model, may be computed.
    assert 0 < loaded[0] < loaded[1]

"""The examples run, as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.engine.tiny import tiny_model

ROOT = Path(__file__).parents[2]


def test_a_chat_goes_on_after_a_restart(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    loaded = []
    answers = []
    for _ in range(2):
        command = [sys.executable, "examples/transformers_chat.py", str(model)]
        ended = subprocess.run(
            [*command, str(tmp_path / "cache")],
            input="What is stored is not computed again, is it?\nAnd what is not stored?\n",
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        said = re.search(r"(\d+) of (\d+) tokens of prompts were loaded", ended.stdout)
        assert said is not None, ended.stdout
        loaded.append(int(said[1]) / int(said[2]))
        answers.append(re.findall("model: (.*)", ended.stdout))
    assert answers[0] == answers[1]
    assert len(answers[0]) == 2
    # In the first run the second question found the first; in the second run both were there.
    assert 0 < loaded[0] < 0.8 < loaded[1]

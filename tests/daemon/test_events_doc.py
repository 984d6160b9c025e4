"""The Python in docs/events.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.store.rig import Rig, chain, put

PAGE = (Path(__file__).parents[2] / "docs" / "events.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run(snippet: str) -> None:
    exec(compile(snippet, "docs/events.md", "exec"), {})


def test_in_the_store_s_process(capsys: pytest.CaptureFixture[str]) -> None:
    run(SNIPPETS[0])
    assert capsys.readouterr().out == "6 blocks in RAM\n"


def test_over_grpc(rig: Rig, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(rig.store, chain(7))
    assert rig.store.flush()
    assert "127.0.0.1:7423" in SNIPPETS[1]
    run(SNIPPETS[1].replace("127.0.0.1:7423", address))
    assert capsys.readouterr().out == "14 blocks\n"
    assert len(SNIPPETS) == 2

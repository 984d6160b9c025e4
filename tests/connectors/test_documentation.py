"""docs/connectors.md: its example runs as it stands there, passes the kit, and is short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "connectors.md").read_text()
ENGINE, CHECKED = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)


def test_the_made_up_engine_runs_and_passes_the_kit(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "connectors"}
    exec(compile(ENGINE, "docs/connectors.md", "exec"), names)
    assert capsys.readouterr().out == (
        "120 tokens of the prompt were computed\n112 were loaded, 8 computed\n"
    )
    exec(compile(CHECKED, "docs/connectors.md", "exec"), names)


def test_it_is_short() -> None:
    assert len(ENGINE.splitlines()) < 100

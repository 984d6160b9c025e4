"""The Python in docs/grpc.md runs as it stands there, and names blocks as kvstore does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kvstore.hashing import TokenChain
from kvstore.identity import Namespace
from tests.store.rig import Rig

PAGE = (Path(__file__).parents[2] / "docs" / "grpc.md").read_text()


def test_the_example(address: str, rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert "127.0.0.1:7423" in snippet
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(snippet.replace("127.0.0.1:7423", address), "grpc.md", "exec"), names)
    assert capsys.readouterr().out == "6 blocks stored\n98304 bytes read\n"
    own = TokenChain(Namespace(**names["fields"]), names["tokens"]).chain()
    assert rig.store.probe(own).tiers == ["ram"] * 6

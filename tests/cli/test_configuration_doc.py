"""docs/configuration.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kvstore
from kvstore import sources
from tests.cli.configuration_doc import DOCUMENT, MARK, table, written


def test_the_table_is_up_to_date() -> None:
    text = DOCUMENT.read_text()
    assert MARK in text
    assert text.endswith(table())
    assert text == written(), "run: python -m tests.cli.configuration_doc"


def test_the_examples_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every indented block is Python, in order; run as one program."""
    text = DOCUMENT.read_text().replace("/mnt/cache", str(tmp_path / "cache"))
    text = text.replace('"1 GiB"', '"8 MiB"').replace('"10 GiB"', '"16 MiB"')
    program = "\n".join(re.findall(r"^    (.*)$", text, re.MULTILINE))
    opened: list[kvstore.BlockStore] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVSTORE_RAM__CAPACITY_BYTES", "8 MiB")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for line in program.splitlines():
        scope: dict[str, object] = {"kvstore": kvstore, "sources": sources}
        exec(line, scope)
        if "store" in scope:
            store = scope["store"]
            assert isinstance(store, kvstore.BlockStore)
            opened.append(store)
            store.close()
    assert len(opened) == 2

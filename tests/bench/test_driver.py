"""What `nvidia-smi` says of a GPU, where there is one that says anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.bench.driver import driver_facts

# Prints a number for each field that it is asked for, the last one being "[N/A]".
_ANSWERS = """#!/bin/sh
[ "$1" = --id=GPU-a-b ] && [ "$3" = --format=csv,noheader,nounits ] || exit 6
fields=$(echo "${2#--query-gpu=}" | tr , ' ')
number=0 line=
for field in $fields; do number=$((number + 1)); line="$line$number, "; done
echo "${line%"$number, "}[N/A]"
"""


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(script)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_each_field_by_a_name_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, _ANSWERS)
    facts = driver_facts("a-b")
    assert driver_facts("GPU-a-b") == facts
    assert (facts["driver"], facts["pcie_generation"], facts["pcie_lanes_most"]) == ("1", "2", "5")
    assert facts["power_limit_w"] == "[N/A]"
    assert driver_facts("another") == {}


@pytest.mark.parametrize("script", ["#!/bin/sh\necho no devices were found", "no program"])
def test_whatever_else_it_says_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    smi(tmp_path, monkeypatch, script)
    assert driver_facts("a-b") == {}


def test_without_it_there_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_facts("a-b") == {}

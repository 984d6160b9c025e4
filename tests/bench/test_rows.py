"""The arithmetic of a figure: ratio, bound, verdict; and what is written down of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstore.bench import report
from kvstore.bench.rows import Row, Unmeasured


def row(
    value: float,
    ceiling: float | None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    return Row("ram put", "ram", value, "GB/s", ceiling, "memcpy", at_least, at_most)


@pytest.mark.parametrize(
    ("value", "ceiling", "bounds", "ratio", "ok"),
    [
        (9.0, 10.0, {"at_least": 0.9}, 0.9, True),
        (8.9, 10.0, {"at_least": 0.9}, 0.89, False),
        (0.5, 10.0, {"at_most": 0.05}, 0.05, True),
        (0.6, 10.0, {"at_most": 0.05}, 0.06, False),
        (5.0, 10.0, {}, 0.5, None),  # for information
        (5.0, None, {"at_least": 0.9}, None, None),  # nothing to compare with
    ],
)
def test_a_row_is_judged_by_its_own_bound(
    value: float,
    ceiling: float | None,
    bounds: dict[str, float],
    ratio: float | None,
    ok: bool | None,
) -> None:
    judged = row(value, ceiling, **bounds)
    assert judged.ratio == (None if ratio is None else pytest.approx(ratio))
    assert judged.ok is ok


def test_one_missed_bound_spoils_the_run_and_information_does_not() -> None:
    kept, informs = row(9.0, 10.0, at_least=0.5), row(1.0, 10.0)
    missed = row(1.0, 10.0, at_least=0.5)
    run = {"effort": "full", "machine": {}}
    assert report.document([kept, informs], [], run)["ok"] is True
    results = report.document([kept, informs, missed], [], run)
    assert (results["ok"], results["judged"]) == (False, 2)


def test_a_run_in_which_nothing_was_judged_is_not_ok() -> None:
    run = {"effort": "full", "machine": {}}
    skipped = Unmeasured("copies", "skipped", "no room")
    assert report.document([row(1.0, 10.0)], [skipped], run)["ok"] is False


def test_a_benchmark_that_broke_spoils_the_run_and_one_that_is_skipped_does_not() -> None:
    kept, run = row(9.0, 10.0, at_least=0.5), {"effort": "full", "machine": {}}
    skipped, failed = (Unmeasured("vllm", "skipped", "no"), Unmeasured("ram", "failed", "a bug"))
    assert report.document([kept], [skipped], run)["ok"] is True
    assert report.document([kept], [skipped, failed], run)["ok"] is False


def test_what_is_written_is_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "latest.json"
    run = {"effort": "full", "machine": {"cpu": "a µCPU"}}
    measured = row(9.0, 10.0, at_least=0.5)
    report.write(report.document([measured], [Unmeasured("vllm", "skipped", "no")], run), path)
    read = json.loads(path.read_text())
    assert read["machine"] == {"cpu": "a µCPU"}
    assert read["unmeasured"] == [{"name": "vllm", "outcome": "skipped", "reason": "no"}]
    assert read["rows"] == [
        {
            "name": "ram put",
            "group": "ram",
            "value": 9.0,
            "unit": "GB/s",
            "ceiling": 10.0,
            "against": "memcpy",
            "ratio": 0.9,
            "at_least": 0.5,
            "at_most": None,
            "ok": True,
            "checksums": "",
            "note": "",
        }
    ]

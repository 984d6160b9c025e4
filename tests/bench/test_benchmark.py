"""What a benchmark is refused, and what becomes of one that breaks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvstore.bench.benchmark import Bench, Benchmark, measured
from kvstore.bench.rows import NotHereError, Row, Unmeasured
from kvstore.bench.sizes import TINY, weight_count
from tests.bench.cpu_card import CpuCard

ROW = Row("a", "g", 1.0, "GB/s")


def breaking(error: Exception) -> Benchmark:
    def run(bench: Bench) -> Iterator[Row | Unmeasured]:
        yield ROW
        raise error

    return Benchmark("broken", run)


def working(bench: Bench) -> Iterator[Row | Unmeasured]:
    yield ROW


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (RuntimeError("a\n bug"), "failed", "RuntimeError: a bug"),
        (NotHereError("no drive"), "skipped", "no drive"),
        (torch.OutOfMemoryError("a leak"), "failed", "OutOfMemoryError: a leak"),
    ],
)
def test_what_breaks_costs_its_own_rows_alone(
    bench: Bench, error: Exception, outcome: str, reason: str
) -> None:
    began: list[str] = []
    got = list(measured([breaking(error), Benchmark("next", working)], bench, began.append))
    assert [each for each in got if isinstance(each, Row)] == [ROW, ROW]
    (said,) = [each for each in got if isinstance(each, Unmeasured)]
    assert (said.name, said.outcome, said.reason) == ("broken", outcome, reason)
    assert began == ["broken", "next"]


def test_nothing_is_begun_when_the_time_is_over(card: CpuCard, tmp_path: Path) -> None:
    late = Bench(card, dataclasses.replace(TINY, time_limit_s=-1), tmp_path)
    began: list[str] = []
    (said,) = measured([Benchmark("late", working)], late, began.append)
    assert isinstance(said, Unmeasured)
    assert said.outcome == "skipped"
    assert began == []


def test_memory_is_given_back_after_each(bench: Bench, card: CpuCard) -> None:
    before = card.cleared
    list(measured([breaking(RuntimeError()), Benchmark("b", working)], bench, str))
    assert card.cleared == before + 2


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        ({"hbm_bytes": 1001}, r"needs 1001 B on the device; there are 1000 B"),
        ({"ram_bytes": 1 << 60}, "of RAM"),
        ({"disk_bytes": 1 << 60}, "on the drive of"),
    ],
)
def test_what_there_is_no_room_for(
    card: CpuCard, tmp_path: Path, needs: dict[str, int], says: str
) -> None:
    small = Bench(CpuCard(card.runtime, free_bytes=1000), TINY, tmp_path)
    small.need(hbm_bytes=1000, ram_bytes=1 << 20, disk_bytes=1 << 20)
    with pytest.raises(NotHereError, match=says):
        small.need(**needs)


def test_what_was_there_and_is_not_given_back_is_a_failure(card: CpuCard, tmp_path: Path) -> None:
    leaking = CpuCard(card.runtime, free_bytes=1 << 30)
    small = Bench(leaking, TINY, tmp_path)
    assert small.model is small.model  # the weights are there to stay
    weights_bytes = 2 * weight_count(TINY.model)
    leaking.free = 1000
    with pytest.raises(NotHereError, match=r"there are 1000 B$"):
        small.need(hbm_bytes=(1 << 30) - weights_bytes + 1)
    with pytest.raises(RuntimeError, match="something before kept what it had"):
        small.need(hbm_bytes=(1 << 30) - weights_bytes)


def test_weights_count_until_they_are_there(card: CpuCard, tmp_path: Path) -> None:
    small = Bench(CpuCard(card.runtime, free_bytes=1000), TINY, tmp_path)
    with pytest.raises(NotHereError, match="on the device"):
        small.need_engine(hbm_bytes=1000)
    assert small.model is small.model
    small.need_engine(hbm_bytes=1000)
    with pytest.raises(NotHereError, match="on the device"):
        small.need_engine(hbm_bytes=1001)

"""Who is measured when, and what counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.catalogue import CATALOGUE, select
from benchmarks.harness import QUICK, Bench, Benchmark, NotHereError, outcome, rates, rounds
from benchmarks.rows import Row, Unmeasured


def contender(name: str, seconds: Iterator[float], log: list[str]) -> Callable[[], float]:
    def turn() -> float:
        log.append(name)
        return next(seconds)

    return turn


def test_contenders_take_turns_and_the_first_round_is_dropped() -> None:
    log: list[str] = []
    turns = {
        "a": contender("a", iter([99.0, 1.0, 2.0]), log),
        "b": contender("b", iter([99.0, 3.0, 4.0]), log),
    }
    assert rounds(turns, 2) == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    assert log == ["a", "b"] * 3


def test_a_rate_comes_from_the_median() -> None:
    turns = {"a": contender("a", iter([99.0, 1.0, 50.0, 2.0]), [])}
    assert rates(turns, 3, 4_000_000_000) == {"a": 2.0}


def test_what_cannot_run_here_says_why() -> None:
    def absent(bench: Bench) -> list[Row]:
        raise NotHereError("no such disk")

    measured = outcome(Benchmark("x", "g", absent), Bench(QUICK, Path("/nowhere")))
    assert measured == Unmeasured("x", "skipped", "no such disk")


def test_what_breaks_does_not_end_the_run() -> None:
    def broken(bench: Bench) -> list[Row]:
        raise RuntimeError("a bug")

    measured = outcome(Benchmark("x", "g", broken), Bench(QUICK, Path("/nowhere")))
    assert measured == Unmeasured("x", "failed", "RuntimeError: a bug")


def test_selection_is_by_name_by_group_or_all() -> None:
    assert [chosen.name for chosen in select(["ram"])] == ["ram/2MiB", "ram/128KiB"]
    assert [chosen.name for chosen in select(["*/2MiB", "probe"])] == [
        "probe",
        "ram/2MiB",
        "nvme/2MiB",
        "daemon/2MiB",
        "daemon/tcp/2MiB",
        "daemon/redis/2MiB",
        "daemon/mooncake/2MiB",
        "daemon/lmcache/2MiB",
        "lmcache/2MiB",
    ]
    assert select([]) == list(CATALOGUE)
    with pytest.raises(ValueError, match="no benchmark is called 'rom'; the groups are hashing"):
        select(["rom"])

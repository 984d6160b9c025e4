"""What becomes of benchmarks that cannot run or break, and how they are chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.catalogue import CATALOGUE, select
from benchmarks.harness import QUICK, Bench, Benchmark, outcome
from kvstore.bench.rows import NotHereError, Row, Unmeasured


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

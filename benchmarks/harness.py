"""How everything is measured: contenders take turns, the first round does not count, medians.

Turns (A B A B, not A A B B) because a shared machine drifts by more than what
is being compared; the first round faults pages in and fills caches; a median
because the rest is noise with a long tail.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.rows import Row, Unmeasured

log = logging.getLogger(__name__)

Turn = Callable[[], float]  # does the work once; returns the seconds that count

KiB, MiB = 1 << 10, 1 << 20


@dataclass(frozen=True, slots=True)
class Workload:
    """`count` blocks of `block_bytes`, as one chain."""

    label: str
    block_bytes: int
    count: int

    @property
    def total_bytes(self) -> int:
        return self.block_bytes * self.count


@dataclass(frozen=True, slots=True)
class Effort:
    """How much work a run puts in: `FULL` for figures, `QUICK` to see that all of it works."""

    rounds: int  # that count; one more runs before them
    workloads: tuple[Workload, ...]
    probe_blocks: int  # resident while 1,000 of them are probed
    hash_tokens: int
    restart_blocks: int
    prompt_tokens: int
    decode_tokens: int


FULL = Effort(
    rounds=7,
    workloads=(Workload("2 MiB", 2 * MiB, 512), Workload("128 KiB", 128 * KiB, 2048)),
    probe_blocks=65_536,
    hash_tokens=131_072,
    restart_blocks=1_000_000,
    prompt_tokens=2_000,
    decode_tokens=128,
)
QUICK = Effort(
    rounds=2,
    workloads=(Workload("2 MiB", 2 * MiB, 8), Workload("128 KiB", 128 * KiB, 32)),
    probe_blocks=2_048,
    hash_tokens=131_072,
    restart_blocks=2_000,
    prompt_tokens=200,
    decode_tokens=16,
)


@dataclass(frozen=True, slots=True)
class Bench:
    """What a benchmark is given: how hard to try, and an empty directory on the disk measured."""

    effort: Effort
    directory: Path


class NotHereError(Exception):
    """Raised by a benchmark that needs what this machine does not have; says what."""


class Benchmark(NamedTuple):
    """Some rows that are measured together; `run` raises NotHereError where they cannot be."""

    name: str
    group: str
    run: Callable[[Bench], Iterable[Row]]


def rounds(turns: Mapping[str, Turn], count: int) -> dict[str, list[float]]:
    """Seconds of each contender's `count` turns, taken alternately, after one that is dropped."""
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(count + 1):
        for name, turn in turns.items():
            seconds = turn()
            if number:
                taken[name].append(seconds)
    return taken


def medians(turns: Mapping[str, Turn], count: int) -> dict[str, float]:
    """Median seconds of each contender."""
    return {name: statistics.median(taken) for name, taken in rounds(turns, count).items()}


def rates(turns: Mapping[str, Turn], count: int, total_bytes: int) -> dict[str, float]:
    """GB/s (10**9 bytes) of each contender, from its median."""
    return {name: total_bytes / s / 1e9 for name, s in medians(turns, count).items()}


def timed(work: Callable[[], object]) -> Turn:
    """A turn of which everything counts."""

    def turn() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return turn


def outcome(benchmark: Benchmark, bench: Bench) -> list[Row] | Unmeasured:
    """The rows of one benchmark, or why there are none: the others are measured all the same."""
    try:
        return list(benchmark.run(bench))
    except NotHereError as missing:
        return Unmeasured(benchmark.name, "skipped", str(missing))
    except Exception as error:
        log.exception("%s broke", benchmark.name)
        return Unmeasured(benchmark.name, "failed", f"{type(error).__name__}: {error}")

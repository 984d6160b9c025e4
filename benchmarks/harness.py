"""What a benchmark is, how hard it tries, and what comes of one that cannot run or breaks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvstore.bench.rows import NotHereError, Row, Unmeasured

log = logging.getLogger(__name__)

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


class Benchmark(NamedTuple):
    """Some rows that are measured together; `run` raises NotHereError where they cannot be."""

    name: str
    group: str
    run: Callable[[Bench], Iterable[Row]]


def outcome(benchmark: Benchmark, bench: Bench) -> list[Row] | Unmeasured:
    """The rows of one benchmark, or why there are none: the others are measured all the same."""
    try:
        return list(benchmark.run(bench))
    except NotHereError as missing:
        return Unmeasured(benchmark.name, "skipped", str(missing))
    except Exception as error:
        log.exception("%s broke", benchmark.name)
        return Unmeasured(benchmark.name, "failed", f"{type(error).__name__}: {error}")

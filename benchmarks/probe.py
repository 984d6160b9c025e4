"""Asking where 1,000 blocks are, in a store that holds many more; and a dict's answer beside it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import kvstore
from benchmarks import blocks
from benchmarks.harness import Bench, Benchmark, Workload
from kvstore.bench.rows import Row
from kvstore.bench.turns import rounds, timed
from kvstore.hashing import Chain
from kvstore.store import BlockStore

BATCH = 1_000
LIMIT_US = 1.0  # a key
_BLOCK_BYTES = 4_096  # small, so that many fit; their size does not enter into it


def measure(bench: Bench) -> Iterator[Row]:
    count = bench.effort.probe_blocks
    prompts = Workload("4 KiB", _BLOCK_BYTES, count)
    held = blocks.chain(prompts)
    absent = blocks.chain(Workload("4 KiB", _BLOCK_BYTES, BATCH), seed=1)
    present = held.slice(count // 2, count // 2 + BATCH)
    with kvstore.open(ram_bytes=prompts.total_bytes + (16 << 20)) as store:
        _fill(store, held)
        bare = {key: row for row, key in enumerate(held)}
        seconds = rounds(
            {
                "all present": timed(lambda: _probe(store, present, BATCH)),
                "none present": timed(lambda: _probe(store, absent, 0)),
                "a dict": timed(lambda: [bare.get(key) for key in present]),
            },
            20 * bench.effort.rounds,
        )
    in_us = {name: statistics.median(taken) / BATCH * 1e6 for name, taken in seconds.items()}
    for kind in ("all present", "none present"):
        yield Row(
            name=f"probe of {BATCH:,} keys, {kind}",
            group="probe",
            value=in_us[kind],
            unit="µs a key",
            ceiling=LIMIT_US,
            against="the budget",
            at_most=1.0,
            note=f"{count:,} blocks resident; a dict takes {in_us['a dict']:.3f} µs a key",
        )


def _fill(store: BlockStore, chain: Chain) -> None:
    with store.reserve(chain) as reservation:
        reservation.commit()


def _probe(store: BlockStore, chain: Chain, expected: int) -> None:
    if store.probe(chain).prefix != expected:
        raise RuntimeError("the probe did not find what is there")


BENCHMARKS = (Benchmark("probe", "probe", measure),)

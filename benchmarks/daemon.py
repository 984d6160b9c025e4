"""A store in another process: a real `kvstore daemon`, and this process as its client.

Put and get are those of the RAM tier's rows, over a connection, and so is their
ceiling: memcpy between the same buffers, the slots of the daemon's arena as they
are mapped here, and the caller's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial

import numpy as np

import kvstore
from benchmarks import blocks
from benchmarks.harness import Bench, Benchmark, Workload
from benchmarks.ram import copying_in, copying_out, get, putting
from benchmarks.servers import daemon
from kvstore.bench.rows import Row
from kvstore.bench.turns import Turn, rates, rounds, timed
from kvstore.hashing import Chain
from kvstore.verbs import Store

AT_LEAST = 0.85
LEASED = 512
ACQUIRE_LIMIT_US = 300.0
PROBED = 1_000
PROBE_LIMIT_US = 2.0  # a key
ROOM_BYTES = 16 << 20
_SMALL_BYTES = 4_096  # a block's size does not enter into what is only named
_IN_A_ROW = 10  # so that what a release leaves to the daemon is waited for too


def measure(bench: Bench, workload: Workload) -> Iterator[Row]:
    chain = blocks.chain(workload)
    data = blocks.random_bytes(workload)
    out = blocks.buffers(workload)
    source, target = blocks.views(data), blocks.views(out)
    with (
        daemon(bench.directory, workload.total_bytes + ROOM_BYTES) as path,
        kvstore.connect(f"unix://{path}") as store,
    ):
        rate = rates(
            {
                "memcpy in": copying_in(store, chain, source),
                "put": putting(store, chain, source),
                "memcpy out": copying_out(store, chain, target),
                "get": timed(lambda: get(store, chain, target)),
            },
            3 * bench.effort.rounds,
            workload.total_bytes,
        )
    if not np.array_equal(out, data):
        raise RuntimeError("what came out of the daemon is not what went in")
    for verb, ceiling in (("put", "memcpy in"), ("get", "memcpy out")):
        yield Row(
            name=f"daemon {verb} {workload.label}",
            group="daemon",
            value=rate[verb],
            unit="GB/s",
            ceiling=rate[ceiling],
            against="memcpy between the same buffers, one thread",
            at_least=AT_LEAST,
            checksums="nobody: the bytes never left RAM",
        )


def measure_words(bench: Bench) -> Iterator[Row]:
    """What costs a round trip and moves no bytes, in a daemon that holds many blocks."""
    count = bench.effort.probe_blocks
    prompts = Workload("4 KiB", _SMALL_BYTES, count)
    held = blocks.chain(prompts)
    half = count // 2
    with (
        daemon(bench.directory, prompts.total_bytes + ROOM_BYTES) as path,
        kvstore.connect(f"unix://{path}") as store,
    ):
        with store.reserve(held) as reservation:
            reservation.commit()
        seconds = rounds(
            {
                "acquire": _acquiring(store, held.slice(0, LEASED)),
                "lease": _leasing(store, held.slice(0, LEASED)),
                "probe": timed(partial(_probe, store, held.slice(half, half + PROBED))),
            },
            20 * bench.effort.rounds,
        )
    in_us = {name: statistics.median(taken) * 1e6 for name, taken in seconds.items()}
    yield _budget(f"daemon acquire of {LEASED} resident blocks", in_us["acquire"], "µs")
    name = f"daemon acquire of {LEASED} resident blocks, their views, and release"
    yield Row(name=name, group="daemon", value=in_us["lease"], unit="µs", note="no budget")
    yield _budget(f"daemon probe of {PROBED:,} keys", in_us["probe"] / PROBED, "µs a key")


def _acquiring(store: Store, chain: Chain) -> Turn:
    """Until all blocks of a lease are ready; the median of some in a row, released in between."""

    def once() -> float:
        start = time.perf_counter()
        lease = store.acquire(chain)
        ready = lease.ready()
        seconds = time.perf_counter() - start
        lease.release()
        if ready != len(chain):
            raise RuntimeError(f"only {ready} of {len(chain)} blocks leased")
        return seconds

    return lambda: statistics.median(once() for _ in range(_IN_A_ROW))


def _leasing(store: Store, chain: Chain) -> Turn:
    """A lease, its views, and its release; the median of some in a row."""

    def lease() -> None:
        with store.acquire(chain) as lease:
            if len(lease.views) != len(chain):
                raise RuntimeError(f"only {len(lease.views)} of {len(chain)} blocks leased")

    once = timed(lease)
    return lambda: statistics.median(once() for _ in range(_IN_A_ROW))


def _probe(store: Store, chain: Chain) -> None:
    if store.probe(chain).prefix != len(chain):
        raise RuntimeError("the probe did not find what is there")


def _budget(name: str, value: float, unit: str) -> Row:
    return Row(
        name=name,
        group="daemon",
        value=value,
        unit=unit,
        ceiling=ACQUIRE_LIMIT_US if unit == "µs" else PROBE_LIMIT_US,
        against="the budget",
        at_most=1.0,
    )


def _benchmark(index: int, label: str) -> Benchmark:
    return Benchmark(
        f"daemon/{label}", "daemon", lambda bench: measure(bench, bench.effort.workloads[index])
    )


BENCHMARKS = (
    _benchmark(0, "2MiB"),
    _benchmark(1, "128KiB"),
    Benchmark("daemon/words", "daemon", measure_words),
)

"""RAM tier in process: put and get beside memcpy of the same blocks.

Put is reserve, copy into the views, commit; get is acquire, copy out of the
views, release. The ceiling copies between the very same buffers, the slots of
the same store and the caller's, because memory differs by how its pages lie.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

import kvstore
from benchmarks import blocks
from benchmarks.blocks import Blocks
from benchmarks.harness import Bench, Benchmark, Workload
from kvstore.bench.rows import Row
from kvstore.bench.turns import Turn, rates, timed
from kvstore.hashing import Chain
from kvstore.verbs import Store

AT_LEAST = 0.90


def put(store: Store, chain: Chain, source: Blocks) -> None:
    """All of `source` into the store; raises where one block finds no room."""
    with store.reserve(chain) as reservation:
        blocks.copy(reservation.views, source)
        if reservation.commit() != len(chain):
            raise RuntimeError("the store did not take all blocks")


def get(store: Store, chain: Chain, target: Blocks) -> None:
    """All blocks of the chain into `target`, each as it comes; raises where one is missing."""
    done = 0
    with store.acquire(chain) as lease:
        while (ready := lease.wait(done + 1)) > done:
            blocks.copy(target[done:ready], lease.views[done:ready])
            done = ready
        if done != len(chain):
            raise RuntimeError(f"only {done} of {len(chain)} blocks served: {lease.miss}")


def putting(store: Store, chain: Chain, source: Blocks) -> Turn:
    """A turn of `put` into a store that does not hold the chain."""

    def turn() -> float:
        store.evict(chain)
        start = time.perf_counter()
        put(store, chain, source)
        return time.perf_counter() - start

    return turn


def copying_in(store: Store, chain: Chain, source: Blocks) -> Turn:
    """Only the copy of a put: the slots are reserved before and given back after."""

    def turn() -> float:
        store.evict(chain)
        with store.reserve(chain) as reservation:
            slots = reservation.views
            start = time.perf_counter()
            blocks.copy(slots, source)
            return time.perf_counter() - start

    return turn


def copying_out(store: Store, chain: Chain, target: Blocks) -> Turn:
    """Only the copy of a get."""

    def turn() -> float:
        with store.acquire(chain) as lease:
            lease.wait()
            slots = lease.views
            start = time.perf_counter()
            blocks.copy(target, slots)
            return time.perf_counter() - start

    return turn


def measure(bench: Bench, workload: Workload) -> Iterator[Row]:
    """With checksums as they are by default, and, for information, with all of them."""
    yield from _rows(bench, workload, "media", "nobody: the bytes never left RAM")
    yield from _rows(bench, workload, "always", "kvstore (xxh3_64); memcpy does not")


def _rows(bench: Bench, workload: Workload, verify: str, checksums: str) -> Iterator[Row]:
    chain = blocks.chain(workload)
    data = blocks.random_bytes(workload)
    out = blocks.buffers(workload)
    source, target = blocks.views(data), blocks.views(out)
    room_bytes = workload.total_bytes + (16 << 20)
    with kvstore.open(ram_bytes=room_bytes, store_verify=verify) as store:
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
        raise RuntimeError("what came out of the store is not what went in")
    for verb, ceiling in (("put", "memcpy in"), ("get", "memcpy out")):
        by_default = verify == "media"
        yield Row(
            name=f"ram {verb} {workload.label}" + ("" if by_default else ", verified"),
            group="ram",
            value=rate[verb],
            unit="GB/s",
            ceiling=rate[ceiling],
            against="memcpy between the same buffers, one thread",
            at_least=AT_LEAST if by_default else None,
            checksums=checksums,
        )


def _benchmark(index: int, label: str) -> Benchmark:
    return Benchmark(
        f"ram/{label}", "ram", lambda bench: measure(bench, bench.effort.workloads[index])
    )


BENCHMARKS = (_benchmark(0, "2MiB"), _benchmark(1, "128KiB"))

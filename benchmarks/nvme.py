"""NVMe tier through the store, beside the fastest that fio or NIXL make of the same disk.

Put is from the commit of blocks that lie in RAM until all of them can be found
on NVMe. Get is from acquire until the last block lies in RAM, checked, with
O_DIRECT, so that no page cache helps: two prompts take turns in a RAM tier that
has room for one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import kvstore
from benchmarks import blocks
from benchmarks.ceilings import Fio, Pattern
from benchmarks.harness import Bench, Benchmark, Workload
from benchmarks.peers import python_of
from benchmarks.ram import put
from benchmarks.workers.lines import Worker
from kvstore.bench.rows import NotHereError, Row
from kvstore.bench.turns import Turn, rates
from kvstore.hashing import Chain
from kvstore.store import BlockStore

AT_LEAST: dict[Pattern, float] = {"randread": 0.90, "randwrite": 0.85}
_ROOM_BYTES = 64 << 20  # for records, and for what does not divide evenly


def open_store(directory: Path, workload: Workload, prompts: int) -> BlockStore:
    """RAM for exactly one prompt of the workload, NVMe for `prompts`."""
    return kvstore.open(
        ram_bytes=workload.total_bytes,
        nvme_path=directory,
        nvme_bytes=int(prompts * workload.total_bytes * 1.05) + _ROOM_BYTES,
    )


def empty(store: BlockStore, chain: Chain) -> None:
    """Drop the chain from every tier, and wait until its extents are free again."""
    store.evict(chain)
    while store.stats().nvme["blocks"]:
        time.sleep(0.001)


def demoting(store: BlockStore, chain: Chain, data: NDArray[np.uint8]) -> Turn:
    """From the commit of blocks in RAM until NVMe has all of them."""
    source = blocks.views(data)

    def turn() -> float:
        empty(store, chain)
        with store.reserve(chain) as reservation:
            blocks.copy(reservation.views, source)
            start = time.perf_counter()
            reservation.commit()
        store.flush()
        seconds = time.perf_counter() - start
        if store.stats().nvme["blocks"] != len(chain):
            raise RuntimeError("NVMe did not take all blocks")
        return seconds

    return turn


def promoting(store: BlockStore, prompts: list[Chain]) -> Turn:
    """From acquire of a prompt that is on NVMe only until it is all in RAM."""
    turns = 0

    def turn() -> float:
        nonlocal turns
        chain = prompts[turns % len(prompts)]
        turns += 1
        start = time.perf_counter()
        with store.acquire(chain, deadline_s=60) as lease:
            ready = lease.wait()
            seconds = time.perf_counter() - start
            if ready != len(chain) or set(lease.sources) != {"nvme"}:
                raise RuntimeError(f"{ready} of {len(chain)} blocks came, not all from NVMe")
        return seconds

    return turn


def fill(store: BlockStore, prompts: list[Chain], data: NDArray[np.uint8]) -> None:
    """Put every prompt, so that NVMe has all and RAM the last; block i of prompt p is data[i-p]."""
    for number, chain in enumerate(prompts):
        put(store, chain, blocks.views(np.roll(data, number, axis=0)))
        store.flush()


def check(store: BlockStore, prompts: list[Chain], data: NDArray[np.uint8]) -> None:
    """Raises unless NVMe gives back what `fill` put there."""
    for number, chain in enumerate(prompts):
        with store.acquire(chain, deadline_s=60) as lease:
            lease.wait()
            served = [np.frombuffer(view, np.uint8) for view in lease.views]
            expected = np.roll(data, number, axis=0)
            if len(served) != len(chain) or not np.array_equal(np.stack(served), expected):
                raise RuntimeError("what came out of NVMe is not what went in")
            del served


def measure(bench: Bench, workload: Workload) -> Iterator[Row]:
    data = blocks.random_bytes(workload)
    prompts = [blocks.chain(workload, seed) for seed in (0, 1)]
    fio = Fio(bench.directory / "fio", workload)
    best = {pattern: fio.best(pattern) for pattern in AT_LEAST}
    turns: dict[str, Turn] = {pattern: fio.turn(pattern, best[pattern]) for pattern in AT_LEAST}
    with ExitStack() as opened:
        nixl = _nixl(bench.directory / "fio", workload)
        if nixl is not None:
            opened.enter_context(nixl)
            turns["nixl randread"] = nixl.turn("read")
            turns["nixl randwrite"] = nixl.turn("write")
        getting = opened.enter_context(open_store(bench.directory / "get", workload, 2))
        putting = opened.enter_context(open_store(bench.directory / "put", workload, 1))
        fill(getting, prompts, data)
        turns["get"] = promoting(getting, prompts)
        turns["put"] = demoting(putting, prompts[0], data)
        rate = rates(turns, bench.effort.rounds, workload.total_bytes)
        check(getting, prompts, data)
        direct = bool(getting.stats().nvme["o_direct"])
    for verb, pattern in _PATTERNS.items():
        against = {pattern: fio.describe(best[pattern]), f"nixl {pattern}": "NIXL, POSIX plugin"}
        fastest = max((name for name in against if name in rate), key=lambda name: rate[name])
        yield Row(
            name=f"nvme {verb} {workload.label}",
            group="nvme",
            value=rate[verb],
            unit="GB/s",
            ceiling=rate[fastest],
            against=against[fastest],
            at_least=AT_LEAST[pattern],
            checksums="kvstore (xxh3_64 of every block); the ceiling does not",
            note=f"{'O_DIRECT' if direct else 'buffered'}; "
            + ", ".join(f"{against[name]} {rate[name]:.2f}" for name in against if name in rate),
        )


_PATTERNS: dict[str, Pattern] = {"get": "randread", "put": "randwrite"}


def _nixl(file: Path, workload: Workload) -> Worker | None:
    """NIXL over fio's file, where it is installed."""
    try:
        python = python_of("nixl")
    except NotHereError:
        return None
    module = "benchmarks.workers.nixl_worker"
    return Worker(python, module, file, workload.block_bytes, workload.count)


def _benchmark(index: int, label: str) -> Benchmark:
    return Benchmark(
        f"nvme/{label}", "nvme", lambda bench: measure(bench, bench.effort.workloads[index])
    )


BENCHMARKS = (_benchmark(0, "2MiB"), _benchmark(1, "128KiB"))

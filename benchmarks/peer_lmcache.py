"""LMCache's local backends, turn by turn with ours, on the same blocks.

Both run in a process of their own, with one thread of torch or numpy. RAM put
is allocate, copy in, publish; get is look up, copy out, release. Disk put is
the same from the caller's buffers until the last block can be found on disk;
disk get is from disk, past the page cache, into the caller's buffers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import kvstore
from benchmarks import blocks
from benchmarks.harness import Bench, Benchmark, Workload
from benchmarks.nvme import empty, fill, open_store
from benchmarks.peers import python_of
from benchmarks.ram import get, put, putting
from benchmarks.workers.lines import Worker
from kvstore.bench.rows import Row
from kvstore.bench.turns import Turn, rates, timed
from kvstore.store import BlockStore

# What the row must reach, as a multiple of LMCache's figure.
AHEAD = {
    ("2 MiB", "ram put"): 1.0,
    ("2 MiB", "ram get"): 1.0,
    ("2 MiB", "nvme put"): 1.0,
    ("2 MiB", "nvme get"): 1.0,
    ("128 KiB", "ram put"): 2.0,
    ("128 KiB", "ram get"): 2.0,
    ("128 KiB", "nvme put"): 10.0,
    ("128 KiB", "nvme get"): 1.0,
}


def measure(bench: Bench, workload: Workload) -> Iterator[Row]:
    yield from _ram(bench, workload)
    yield from _disk(bench, workload)


def _ram(bench: Bench, workload: Workload) -> Iterator[Row]:
    chain = blocks.chain(workload)
    data = blocks.random_bytes(workload)
    out = blocks.buffers(workload)
    with (
        _worker("LocalCPUBackend", bench, workload) as peer,
        kvstore.open(ram_bytes=workload.total_bytes + (16 << 20)) as store,
    ):
        turns: dict[str, Turn] = {
            "ram put": putting(store, chain, blocks.views(data)),
            "lmcache ram put": peer.turn("put"),
            "ram get": timed(lambda: get(store, chain, blocks.views(out))),
            "lmcache ram get": peer.turn("get"),
        }
        rate = rates(turns, 3 * bench.effort.rounds, workload.total_bytes)
    for kind in ("ram put", "ram get"):
        yield _row(kind, workload, rate, "neither: the bytes never left RAM")


def _disk(bench: Bench, workload: Workload) -> Iterator[Row]:
    data = blocks.random_bytes(workload)
    out = blocks.buffers(workload)
    prompts = [blocks.chain(workload, seed) for seed in (0, 1)]
    written = blocks.chain(workload, 2)
    source, target = blocks.views(data), blocks.views(out)
    with ExitStack() as opened:
        peer = opened.enter_context(_worker("LocalDiskBackend", bench, workload))
        getting = opened.enter_context(open_store(bench.directory / "get", workload, 2))
        putting_to = opened.enter_context(open_store(bench.directory / "put", workload, 1))
        fill(getting, prompts, data)
        alternate = iter(prompts * (bench.effort.rounds + 1))

        def store_all() -> float:
            empty(putting_to, written)
            start = time.perf_counter()
            put(putting_to, written, source)
            putting_to.flush()
            seconds = time.perf_counter() - start
            _expect_on_disk(putting_to, workload.count)
            return seconds

        turns: dict[str, Turn] = {
            "nvme put": store_all,
            "lmcache nvme put": peer.turn("put"),
            "nvme get": timed(lambda: get(getting, next(alternate), target)),
            "lmcache nvme get": peer.turn("get"),
        }
        rate = rates(turns, bench.effort.rounds, workload.total_bytes)
    for kind in ("nvme put", "nvme get"):
        yield _row(kind, workload, rate, "kvstore (xxh3_64 of every block); LMCache does not")


def _expect_on_disk(store: BlockStore, count: int) -> None:
    if store.stats().nvme["blocks"] != count:
        raise RuntimeError("NVMe did not take all blocks")


def _row(kind: str, workload: Workload, rate: dict[str, float], checksums: str) -> Row:
    return Row(
        name=f"{kind} {workload.label}, beside LMCache",
        group="lmcache",
        value=rate[kind],
        unit="GB/s",
        ceiling=rate[f"lmcache {kind}"],
        against="LMCache 0.5.6 "
        + ("local CPU" if kind.startswith("ram") else "local disk, O_DIRECT"),
        at_least=AHEAD[workload.label, kind],
        checksums=checksums,
    )


def _worker(backend: str, bench: Bench, workload: Workload) -> Worker:
    return Worker(
        python_of("lmcache"),
        "benchmarks.workers.lmcache_worker",
        backend,
        workload.block_bytes,
        workload.count,
        bench.directory / "lmcache",
        env={"OMP_NUM_THREADS": "1"},
    )


def _benchmark(index: int, label: str) -> Benchmark:
    return Benchmark(
        f"lmcache/{label}", "lmcache", lambda bench: measure(bench, bench.effort.workloads[index])
    )


BENCHMARKS = (_benchmark(0, "2MiB"), _benchmark(1, "128KiB"))

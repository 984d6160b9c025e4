"""A new process opens an NVMe directory that holds a million blocks: when is the first one served?

The blocks are small, because only their number costs anything here, and the
tier's own code has written them. The records are not in the page cache.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks import blocks
from benchmarks.harness import Bench, Benchmark, Workload
from benchmarks.workers.lines import Worker
from kvstore.bench.rows import NotHereError, Row
from kvstore.tier import Record, WriteItem
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_directory import RECORD_ROOM_BYTES

LIMIT_S = 5.0
PROMPT = Workload("4 KiB", 4_096, 1_000)
ROUNDS = 3


def capacity_bytes(count: int) -> int:
    """Of a tier with room for that many records: they get 1/64 of it."""
    return (count + 1_000) * RECORD_ROOM_BYTES * 64 + (64 << 20)


async def build(directory: Path, count: int) -> None:
    """Write `count` blocks: prompts of 1,000, by number."""
    with mmap.mmap(-1, PROMPT.total_bytes) as memory:
        memory[:] = blocks.random_bytes(PROMPT).tobytes()
        step = PROMPT.block_bytes
        with memoryview(memory) as whole:
            views = [whole[i : i + step] for i in range(0, PROMPT.total_bytes, step)]
            tier = NvmeTier(directory, capacity_bytes(count))
            try:
                await tier.remember([blocks.namespace(step)])
                for prompt in range(count // PROMPT.count):
                    written = await tier.write(_items(prompt, views))
                    if any(result.refusal for result in written):
                        raise RuntimeError("the tier did not take all blocks")
            finally:
                await tier.close()
                for view in views:
                    view.release()


def _items(prompt: int, views: list[memoryview]) -> list[WriteItem]:
    chain = blocks.chain(PROMPT, prompt)
    parents = (chain.parent, *chain.keys)
    space = chain.namespace.fingerprint
    return [
        WriteItem(Record(space, key, parent, PROMPT.block_bytes), view)
        for key, parent, view in zip(chain.keys, parents, views, strict=False)
    ]


def drop_from_page_cache(directory: Path) -> None:
    """Of every file in the directory. They must be on the disk first."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def measure(bench: Bench) -> Iterator[Row]:
    count = bench.effort.restart_blocks
    free_bytes = shutil.disk_usage(bench.directory).free
    if capacity_bytes(count) > free_bytes * 0.9:
        raise NotHereError(f"{capacity_bytes(count) / 1e9:.0f} GB of free disk are needed")
    directory = bench.directory / "restart"
    asyncio.run(build(directory, count))
    served, imported = [], []
    for number in range(ROUNDS):
        drop_from_page_cache(directory)
        with Worker(
            Path(sys.executable), "benchmarks.workers.restart_worker", directory, count
        ) as worker:
            imported.append(worker.ask("imported"))
            served.append(worker.ask("serve", prompt=number * (count // PROMPT.count) // ROUNDS))
    yield Row(
        name=f"restart with {count:,} blocks on NVMe",
        group="restart",
        value=statistics.median(served),
        unit="s",
        ceiling=LIMIT_S,
        against="the budget",
        at_most=1.0,
        checksums="kvstore (xxh3_64 of what it serves)",
        note="from open to a prompt of 1,000 blocks in RAM, records not cached; "
        f"importing kvstore took {statistics.median(imported):.2f} s before that",
    )


BENCHMARKS = (Benchmark("restart", "restart", measure),)

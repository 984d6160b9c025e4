"""Comparing blocks on the drive with their checksums while the tier is in use."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence

import numpy as np

from kvstore.allocator import align_up
from kvstore.frame import checksum
from kvstore.hashing import Key
from kvstore.tier import Checked, Record
from kvstore.tiers.blockfile import PASSING_ERRORS, Block
from kvstore.tiers.nvme_slab import Slab

STEP_BYTES = 16 << 20  # read at once, into memory of our own


def check_blocks(slab: Slab, keys: Sequence[Key], now_s: float) -> Checked:
    """Read blocks as they are stored; those whose bytes are wrong are dropped. Blocks.

    They are pinned meanwhile, and counted as used by nobody.
    """
    table = slab.table
    with slab.lock:
        rows = sorted({row for row in table.find(keys) if row is not None})
        pinned = np.array(rows, dtype=np.int64)
        records, offsets = table.records(rows), table.slots.index.offset[pinned].tolist()
        table.slots.pin(pinned)
    broken: list[int] = []
    try:
        for step in _steps(records):
            broken += [step.start + n for n in _broken(slab, records[step], offsets[step])]
    finally:
        with slab.lock:
            table.condemn(rows[place] for place in broken)
            condemned = table.unpin(pinned, now_s)
            slab.counters["damaged_blocks"] += len(broken)
        slab.release(condemned)
    stored_bytes = sum(record.stored_bytes for record in records)
    return Checked(len(records), stored_bytes, [records[place].key for place in broken])


def _steps(records: Sequence[Record]) -> Iterator[slice]:
    start = nbytes = 0
    for place, record in enumerate(records):
        size = align_up(record.stored_bytes)
        if nbytes and nbytes + size > STEP_BYTES:
            yield slice(start, place)
            start, nbytes = place, 0
        nbytes += size
    if nbytes:
        yield slice(start, len(records))


def _broken(slab: Slab, records: Sequence[Record], offsets: Sequence[int]) -> list[int]:
    """Which of these blocks are not what was written."""
    sizes = [align_up(record.stored_bytes) for record in records]
    scratch = memoryview(mmap.mmap(-1, sum(sizes)))
    blocks = []
    start = 0
    for offset, size in zip(offsets, sizes, strict=True):
        blocks.append(Block(offset, scratch[start : start + size]))
        start += size
    broken: list[int] = []

    def arrived(place: int, error: int) -> None:
        record = records[place]
        if error in PASSING_ERRORS:  # nothing is known against the block
            return
        stored = blocks[place].buffer[: record.stored_bytes]
        if error or checksum(stored) != record.checksum:
            broken.append(place)

    slab.file.read(blocks, arrived)
    return broken

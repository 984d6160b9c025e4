"""Reading batches of blocks from an NVMe slab, and doubting every one of them."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvstore.allocator import align_up
from kvstore.codec import codec
from kvstore.errors import CodecError
from kvstore.frame import checksum
from kvstore.tier import Miss, ReadRequest, ReadResult, Record
from kvstore.tiers.blockfile import PASSING_ERRORS, Block
from kvstore.tiers.nvme_slab import Slab


class _Read(NamedTuple):
    """A block that is there, pinned, and about to be read."""

    number: int  # of the request
    row: int
    record: Record
    block: Block


def read_blocks(slab: Slab, requests: Sequence[ReadRequest], now_s: float) -> list[ReadResult]:
    """Identity first, then bytes, then checksum. Blocks; runs in a worker thread.

    A checksum is compared, and a codec undone, while other blocks are on their way.
    """
    results: list[ReadResult | None] = [None] * len(requests)
    reads = _begin(slab, requests, results)
    broken: list[int] = []
    served: list[_Read] = []
    unread = 0

    def arrived(place: int, error: int) -> None:
        nonlocal unread
        read = reads[place]
        if not error and _is_sound(read, requests[read.number].buffer):
            results[read.number] = ReadResult(read.record, None)
            served.append(read)
            return
        unread += error != 0
        if error in PASSING_ERRORS:  # nothing is known against the block
            results[read.number] = ReadResult(None, Miss.BREAKER)
            return
        results[read.number] = ReadResult(None, Miss.CHECKSUM)
        broken.append(read.row)

    try:
        reads = _with_scratch(reads)
        slab.file.read([read.block for read in reads], arrived)
    finally:
        _end(slab, reads, served, broken, now_s)
    with slab.lock:
        counters = slab.counters
        counters["read_blocks"] += len(served)
        counters["read_bytes"] += sum(read.record.stored_bytes for read in served)
        counters["unreadable_blocks"] += unread
        for result in results:
            if result is not None and result.miss is not None:
                counters[f"misses_{result.miss.value}"] += 1
    return [result or ReadResult(None, Miss.CHECKSUM) for result in results]


def _begin(
    slab: Slab, requests: Sequence[ReadRequest], results: list[ReadResult | None]
) -> list[_Read]:
    """Find and pin the blocks that are there and are what was asked for."""
    table = slab.table
    with slab.lock:
        found = table.find([request.key for request in requests])
        there = [row for row in found if row is not None]
        records = iter(table.records(there))
        offsets = iter(table.slots.index.offset[there].tolist())
        reads = []
        for number, (request, row) in enumerate(zip(requests, found, strict=True)):
            if row is None:
                evicted = table.slots.was_evicted(request.key)
                results[number] = ReadResult(None, Miss.EVICTED if evicted else Miss.ABSENT)
                continue
            record, offset = next(records), next(offsets)
            if record.namespace != request.namespace or record.raw_bytes != request.raw_bytes:
                results[number] = ReadResult(None, Miss.IDENTITY)
                continue
            buffer = request.buffer.cast("B")[: record.raw_bytes]
            reads.append(_Read(number, row, record, Block(offset, buffer)))
        table.slots.pin(np.array([read.row for read in reads], dtype=np.int64))
    return reads


def _with_scratch(reads: list[_Read]) -> list[_Read]:
    """What was stored by a codec goes into memory of our own first."""
    sizes = [align_up(r.record.stored_bytes) for r in reads if r.record.codec != "raw"]
    if not sizes:
        return reads
    scratch = memoryview(mmap.mmap(-1, sum(sizes)))
    lent = []
    start = 0
    for read in reads:
        if read.record.codec != "raw":
            size = align_up(read.record.stored_bytes)
            block = Block(read.block.offset, scratch[start : start + size])
            read = read._replace(block=block)
            start += size
        lent.append(read)
    return lent


def _is_sound(read: _Read, out: memoryview) -> bool:
    """Whether the bytes are those that were written; then the caller's buffer holds the block."""
    record = read.record
    stored = read.block.buffer[: record.stored_bytes]
    if checksum(stored) != record.checksum:
        return False
    if record.codec == "raw":
        return True
    try:
        # Decoding asks the bytes themselves for the element's size; any dtype will do.
        codec(record.codec, "bfloat16").decode(stored, out.cast("B")[: record.raw_bytes])
    except CodecError:
        return False
    return True


def _end(
    slab: Slab, reads: Sequence[_Read], served: Sequence[_Read], broken: Sequence[int], now_s: float
) -> None:
    """Give the pins back. What is broken, or was condemned meanwhile, goes now."""
    rows = np.array([read.row for read in reads], dtype=np.int64)
    with slab.lock:
        slab.table.touch([read.row for read in served], now_s)
        slab.table.condemn(broken)  # pinned until the next line: the rows are still those blocks'
        condemned = slab.table.unpin(rows, now_s)
    slab.release(condemned)

"""The RAM tier: one arena of anonymous shared memory, and the slots in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvstore.allocator import ALIGN_BYTES
from kvstore.errors import ClosedError, SettingsError
from kvstore.frame import checksum
from kvstore.hashing import Key
from kvstore.policy import EvictionPolicy
from kvstore.retention import MAX_PRIORITY
from kvstore.slots import Batch, SlotTable
from kvstore.tier import (
    Miss,
    ReadRequest,
    ReadResult,
    Record,
    Refusal,
    WriteItem,
    WriteResult,
)
from kvstore.tiers.arena import Arena


class RamTier:
    """Slots in an arena of shared memory: gone with the last process that has it.

    The store works on `slots` and `buffer` under `lock`; the verbs serve
    whoever has the tier alone. Memory is taken as slots are first written, so
    opening costs nothing.
    """

    def __init__(self, capacity_bytes: int, policy: EvictionPolicy | None = None) -> None:
        """Raises SettingsError below one page, OSError when the memory is refused."""
        if capacity_bytes < ALIGN_BYTES:
            raise SettingsError(f"a RAM tier needs at least {ALIGN_BYTES} bytes")
        self.slots = SlotTable(capacity_bytes, policy)
        self.lock = threading.Lock()
        self._records: dict[Key, Record] = {}  # of blocks written through `write`
        self._closed = False
        self.arena = Arena(self.slots.space.capacity_bytes)
        self.buffer = self.arena.buffer
        self.populate = self.arena.populate

    @property
    def name(self) -> str:
        return "ram"

    async def contains(self, keys: Sequence[Key]) -> list[bool]:
        with self.lock:
            self._check_open()
            return [row is not None for row in self.slots.find(keys)]

    async def read(self, items: Sequence[ReadRequest]) -> list[ReadResult]:
        """Copies under the lock: this verb is for tests and tools, not for the hot path."""
        with self.lock:
            self._check_open()
            return [self._read(item) for item in items]

    async def write(self, items: Sequence[WriteItem]) -> list[WriteResult]:
        """Copies under the lock; makes room by evicting what has no better claim."""
        with self.lock:
            self._check_open()
            return [WriteResult(self._write(item)) for item in items]

    async def delete(self, keys: Sequence[Key]) -> int:
        with self.lock:
            self._check_open()
            found = [row for row in self.slots.find(keys) if row is not None]
            rows = np.array(sorted(set(found)), dtype=np.int64)
            rows = rows[self.slots.index.pins[rows] == 0]
            for row in rows.tolist():
                self._records.pop(self.slots.index.keys[row] or b"", None)
            self.slots.evict(rows)
            self.slots.free(rows)
            return len(rows)

    async def close(self) -> None:
        """Unmap the arena. With views of it still held it goes when the last of them does."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
            self.arena.close()

    def check_invariants(self) -> None:
        """Raises InvariantError where the slots contradict themselves."""
        with self.lock:
            self.slots.check_invariants()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the RAM tier is closed")

    def _view(self, row: int) -> memoryview:
        start = self.slots.index.offset.item(row)
        return self.buffer[start : start + self.slots.index.nbytes.item(row)]

    def _read(self, item: ReadRequest) -> ReadResult:
        (row,) = self.slots.find([item.key])
        if row is None:
            evicted = self.slots.was_evicted(item.key)
            return ReadResult(None, Miss.EVICTED if evicted else Miss.ABSENT)
        record = self._records.get(item.key)
        if record is None:  # committed through `slots`: the store's business, not this verb's
            return ReadResult(None, Miss.ABSENT)
        if record.namespace != item.namespace or record.raw_bytes != item.raw_bytes:
            return ReadResult(None, Miss.IDENTITY)
        view = self._view(row)
        if checksum(view) != record.checksum:
            rows = np.array([row], dtype=np.int64)
            self.slots.evict(rows)
            self.slots.free(rows)
            return ReadResult(None, Miss.CHECKSUM)
        item.buffer[: item.raw_bytes] = view
        self.slots.touch(np.array([row], dtype=np.int64))
        return ReadResult(record, None)

    def _write(self, item: WriteItem) -> Refusal | None:
        record, nbytes = item.record, item.record.raw_bytes
        if not (0 < nbytes <= item.buffer.nbytes and 0 <= record.priority <= MAX_PRIORITY):
            return Refusal.INVALID
        if self.slots.find([record.key]) != [None]:
            return None
        rows = self.slots.reserve(nbytes, 1)
        while not len(rows):
            now_s = time.time()
            victims = self.slots.victims(nbytes, 1, record.priority, now_s)
            if not len(victims):
                return Refusal.FULL
            self.slots.free(victims)
            rows = self.slots.reserve(nbytes, 1)
        if len(self._records) > 2 * len(self.slots) + 64:  # most are of blocks evicted since
            there = self.slots.index.rows_by_key
            self._records = {key: kept for key, kept in self._records.items() if key in there}
        view = self._view(int(rows[0]))
        view[:] = item.buffer.cast("B")[:nbytes]
        self._records[record.key] = replace(
            record, codec="raw", stored_bytes=nbytes, checksum=checksum(view)
        )
        self.slots.commit(
            rows, Batch(record.namespace, [record.key], [record.parent], record.priority)
        )
        if record.expires_s:
            self.slots.expire_at(rows, record.expires_s)
        return None

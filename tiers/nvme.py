"""The NVMe tier: one slab file for the bytes, LMDB for the records."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

from kvstore.admission import AdmissionRule, WriteBudget, admission_rule
from kvstore.errors import ClosedError, SettingsError, TierError, TierFullError
from kvstore.hashing import Key
from kvstore.histogram import Distribution
from kvstore.identity import Namespace
from kvstore.slots import SlotTable, Usage
from kvstore.tier import Checked, ReadRequest, ReadResult, WriteItem, WriteResult
from kvstore.tiers.driver import DriverName, open_driver
from kvstore.tiers.nvme_check import check_blocks
from kvstore.tiers.nvme_reads import read_blocks
from kvstore.tiers.nvme_records import Durability, RecordError
from kvstore.tiers.nvme_rows import RecordRows
from kvstore.tiers.nvme_slab import Slab, room_of
from kvstore.tiers.nvme_writes import Writes

T = TypeVar("T")

READERS = 4  # batches read at once; more wait
WRITERS = 3  # batches written at once: one commits its records while the others move bytes


class NvmeTier:
    """A `LocalTier` on a drive, whose directory never exceeds `capacity_bytes`.

    Verbs do their blocking part in threads of the tier's own, so the event loop
    stays free, and several batches are under way at once. A verb that is
    cancelled still waits for its bytes: buffers are never used behind the
    caller's back. What survives what: see `RecordFile`.
    """

    def __init__(
        self,
        path: Path,
        capacity_bytes: int,
        *,
        durability: Durability = "cache",
        codec: Literal["raw", "zstd"] = "raw",
        admission: AdmissionRule = "all",
        daily_write_bytes: int | None = None,
        driver: DriverName = "auto",
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """Open or create the directory; blocks while a million records load in seconds.

        `now_s` is seconds since the epoch. Raises DirectoryError when the
        directory cannot be used, SettingsError when the capacity makes no sense
        there, or io_uring was asked for by name and is refused.
        """
        self._now_s = now_s
        try:
            self._driver = open_driver(driver)
        except OSError as error:
            raise SettingsError(
                f"io_uring is refused on this machine ({error.strerror}); "
                "set the NVMe driver to auto or threads"
            ) from error
        try:
            self._slab = Slab(path, capacity_bytes, durability, self._driver)
        except BaseException:
            self._driver.close()
            raise
        day, written_bytes = self._slab.written_before
        budget = WriteBudget(daily_write_bytes, day=day, written_bytes=written_bytes)
        self._writes = Writes(self._slab, codec, admission_rule(admission), budget)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="kvstore-nvme-read")
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="kvstore-nvme-write")
        self._closing = threading.Lock()
        self._closed = False
        self._is_shut = False

    @property
    def name(self) -> str:
        return "nvme"

    # ---- the five verbs

    async def contains(self, keys: Sequence[Key]) -> list[bool]:
        self._check_open()
        return self.peek(keys)

    async def read(self, items: Sequence[ReadRequest]) -> list[ReadResult]:
        return await self._run(self._readers, lambda: read_blocks(self._slab, items, self._now_s()))

    async def write(self, items: Sequence[WriteItem]) -> list[WriteResult]:
        return await self._run(self._writers, lambda: self._writes.write(items, self._now_s()))

    async def delete(self, keys: Sequence[Key]) -> int:
        return await self._run(self._writers, lambda: self._slab.delete(keys))

    async def close(self) -> None:
        """Wait for what is under way, write down the order of use, let go of the directory."""
        self._closed = True
        await _until_done(asyncio.get_running_loop().run_in_executor(None, self.close_now))

    def close_now(self) -> None:
        """What `close` does, for those who have no event loop. Blocks."""
        self._closed = True
        with self._closing:
            if self._is_shut:
                return
            self._is_shut = True
            self._readers.shutdown()
            self._writers.shutdown()
            self._slab.close()
            self._driver.close()

    # ---- what a local tier can say and do besides

    @property
    def slots(self) -> SlotTable:
        return self._slab.table.slots

    @property
    def lock(self) -> threading.Lock:
        return self._slab.lock

    def peek(self, keys: Sequence[Key]) -> list[bool]:
        with self._slab.lock:
            return [row is not None for row in self._slab.table.find(keys)]

    def was_evicted(self, key: Key) -> bool:
        with self._slab.lock:
            return self._slab.table.slots.was_evicted(key)

    def namespaces(self) -> Mapping[bytes, Namespace]:
        with self._slab.lock:
            return dict(self._slab.namespaces)

    async def remember(self, namespaces: Sequence[Namespace]) -> None:
        """Raises TierError when they cannot be written down, TierFullError when no more may."""
        await self._run(self._writers, lambda: self._remember(namespaces))

    def touch(self, keys: Sequence[Key]) -> None:
        """Kept in memory, and written down by `close`: after a crash the order is older."""
        now_s = self._now_s()
        with self._slab.lock:
            self._writes.used(keys)
            rows = [row for row in self._slab.table.find(keys) if row is not None]
            self._slab.table.touch(rows, now_s)

    def protected_bytes(self, namespace: bytes) -> int:
        """What has expired no longer counts."""
        with self._slab.lock:
            slots = self._slab.table.slots
            slots.expire(self._now_s())
            return slots.protected_bytes[slots.namespace_id(namespace)]

    async def retain(self, keys: Sequence[Key], priority: int, expires_s: float) -> int:
        return await self._run(self._writers, lambda: self._retain(keys, priority, expires_s))

    def stats(self) -> Mapping[str, int]:
        slab, daily_bytes = self._slab, self._writes.daily_bytes
        budget = {} if daily_bytes is None else {"daily_write_bytes": daily_bytes}
        with slab.lock:
            space = slab.table.slots.space
            return {
                **slab.counters,
                **budget,
                "blocks": len(slab.table.slots),
                "max_blocks": slab.table.max_blocks,
                "used_bytes": space.used_bytes,
                "capacity_bytes": space.capacity_bytes,
                "written_today_bytes": self._writes.written_today(self._now_s()),
                "read_only": slab.failure is not None,
                "o_direct": slab.file.direct,
                "io_uring": self._driver.name == "uring",
            }

    def usage(self) -> Mapping[bytes, Usage]:
        with self._slab.lock:
            return self._slab.table.slots.usage()

    def eviction_age_s(self) -> Distribution:
        with self._slab.lock:
            return self._slab.table.eviction_age_s.read()

    def page(self, start: int, stop: int) -> tuple[RecordRows, int]:
        table = self._slab.table
        with self._slab.lock:
            return table.page(start, stop), len(table.slots.index.state)

    def check(self, keys: Sequence[Key]) -> Checked:
        """In one of the readers' threads, so that `close` waits for it."""
        self._check_open()
        return self._readers.submit(check_blocks, self._slab, keys, self._now_s()).result()

    def check_invariants(self) -> None:
        """Raises InvariantError unless memory and disk agree. Nothing else may be running."""
        self._slab.check_invariants()

    # ---- in worker threads

    def _remember(self, namespaces: Sequence[Namespace]) -> None:
        slab = self._slab
        with slab.commits:
            with slab.lock:
                new = {n.fingerprint: n for n in namespaces if n.fingerprint not in slab.namespaces}
            if not new:
                return
            taken = slab.namespaces_bytes + room_of(new.values())
            if taken > slab.sizes.namespaces_bytes:
                raise TierFullError(
                    f"{self.name}: no room for more namespaces until it is reopened"
                )
            try:
                slab.records.remember(new)
            except RecordError as error:
                raise TierError(f"{self.name}: namespaces cannot be recorded: {error}") from error
            with slab.lock:
                slab.namespaces.update(new)
                slab.namespaces_bytes = taken

    def _retain(self, keys: Sequence[Key], priority: int, expires_s: float) -> int:
        slab = self._slab
        with slab.commits:
            with slab.lock:
                rows = sorted({row for row in slab.table.find(keys) if row is not None})
                puts = slab.table.retain(rows, priority, expires_s, self._now_s())
            try:
                slab.records.put(puts)
            except RecordError as error:
                slab.fail("records", error)
        return len(rows)

    async def _run(self, threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        self._check_open()
        return await _until_done(asyncio.get_running_loop().run_in_executor(threads, work))

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the NVMe tier is closed")


async def _until_done(future: asyncio.Future[T]) -> T:
    """The future's result. When cancelled, waits all the same, and is cancelled then."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError as error:
            cancelled = error
        except Exception:
            break
    if cancelled is not None:
        future.exception()  # seen
        raise cancelled
    return future.result()

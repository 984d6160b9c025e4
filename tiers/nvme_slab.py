"""The open state of an NVMe tier: bytes, records and table, and the order in which they change."""

from __future__ import annotations

import errno
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import lmdb
import numpy as np

from kvstore.errors import DirectoryError, InvariantError
from kvstore.frame import names
from kvstore.hashing import Key
from kvstore.identity import Namespace
from kvstore.index import State
from kvstore.policy import Rows
from kvstore.quantities import format_size
from kvstore.tiers.blockfile import BlockFile
from kvstore.tiers.driver import Driver
from kvstore.tiers.nvme_directory import Directory, Sizes
from kvstore.tiers.nvme_records import DamageError, Durability, Put, RecordError, RecordFile
from kvstore.tiers.nvme_rows import RecordRows, seal
from kvstore.tiers.nvme_table import BlockTable

log = logging.getLogger(__name__)


class Slab:
    """Shared by reads and writes, which run in several threads.

    `lock` guards `table`, `counters` and `failure`, for microseconds. `commits` lets
    one LMDB transaction run at a time, is taken first, and is held across I/O.
    A block comes: bytes, record, table. It goes: table, record, extent.
    """

    def __init__(
        self, path: Path, capacity_bytes: int, durability: Durability, driver: Driver
    ) -> None:
        """Open or create; blocks while the table is rebuilt. The driver is borrowed.

        Raises DirectoryError and SettingsError, see `Directory`.
        """
        self.sizes = Sizes.of(capacity_bytes)
        self._capacity_bytes = capacity_bytes
        self.durability = durability
        self.lock = threading.Lock()
        self.commits = threading.Lock()
        self.counters: Counter[str] = Counter()
        self.failure: str | None = None  # why nothing is written any more
        self.table = BlockTable(self.sizes.slab_bytes, self.sizes.max_blocks)
        self.namespaces: dict[bytes, Namespace] = {}
        self.namespaces_bytes = 0  # `room_of` them
        self.written_before = (0, 0)  # the last day on which blocks were written, and the bytes
        with ExitStack() as undo:
            self._directory = undo.enter_context(Directory(path, create=True))
            try:
                if capacity_bytes > self._directory.room_bytes():
                    raise self._directory.too_large(capacity_bytes)
                self.records = self._open_records()
                undo.callback(self.records.close)
                self.file = BlockFile(self._directory.slab, driver)
                undo.callback(self.file.close)
                # After the records: bytes beyond a smaller slab's end belong to no block now.
                self.file.resize(self.sizes.slab_bytes)
                # After the slab: a smaller one leaves room for the copy on a full disk.
                if self._directory.records.stat().st_size > self.sizes.map_bytes:
                    self.records.shrink(self.sizes.map_bytes)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise self._directory.too_large(capacity_bytes) from error
                raise self._directory.refusal(error) from error
            except lmdb.ReadonlyError as error:
                raise DirectoryError(f"no permission to use {path}: {error}") from error
            except lmdb.Error as error:
                raise DirectoryError(f"{path}: the records cannot be kept: {error}") from error
            undo.pop_all()

    def _open_records(self) -> RecordFile:
        """The records, already in the table. A file that LMDB cannot follow is begun anew."""
        try:
            return self._load_records()
        except DamageError as error:
            path = self._directory.records
            log.warning("%s is damaged (%s): its blocks are given up", path, error)
            path.unlink()
            self.table = BlockTable(self.sizes.slab_bytes, self.sizes.max_blocks)
            self.counters["record_files_lost"] += 1
            return self._load_records()

    def _load_records(self) -> RecordFile:
        path = self._directory.records
        held_bytes = path.stat().st_size if path.exists() else 0
        # A file from a larger capacity is read as it is, and shrunk when its blocks are known.
        records = RecordFile(path, max(self.sizes.map_bytes, held_bytes), self.durability)
        try:
            offsets, found = records.load()
            dropped = self.table.load(offsets, found)
            if dropped:
                self._tell_of_shrinking(found.rows[found.intact & np.isin(offsets, dropped)])
                self._drop(records, dropped)
            self.namespaces = records.namespaces()
            self._forget_some(records)
            self.namespaces_bytes = room_of(self.namespaces.values())
            self.written_before = records.written()
        except BaseException:
            records.close()
            raise
        self.counters["dropped_records"] = len(dropped)
        return records

    def _tell_of_shrinking(self, dropped: RecordRows) -> None:
        """Where the directory was made for more: not everyone who asks for less expects that."""
        path, file = self._directory.path, self._directory.slab
        if not file.exists() or file.stat().st_size <= self.sizes.slab_bytes:
            return
        log.warning(
            "%s was made for %s and is opened with %s: %d blocks (%s) are dropped",
            path,
            format_size(self._directory.made_for()),
            format_size(self._capacity_bytes),
            len(dropped),
            format_size(int(dropped["stored_bytes"].sum())),
        )

    def _drop(self, records: RecordFile, offsets: Sequence[int]) -> None:
        """Delete records that are no good. Where the disk refuses, what is good is still served."""
        try:
            records.delete(offsets)
        except DamageError:
            raise
        except RecordError as error:
            self.fail("records", error)

    def _forget_some(self, records: RecordFile) -> None:
        """Make room for the namespaces to come, where those without blocks take a good part."""
        if room_of(self.namespaces.values()) <= self.sizes.namespaces_bytes // 2:
            return
        held = self.table.slots.usage()
        unused = [name for name in self.namespaces if name not in held]
        try:
            records.forget(unused)
        except DamageError:
            raise
        except RecordError as error:
            self.fail("records", error)
        else:
            for name in unused:
                del self.namespaces[name]

    # ---- changes, called from worker threads

    def publish(
        self, rows: Sequence[int], records: RecordRows, written_today: tuple[int, int]
    ) -> None:
        """Make blocks whose bytes are in the slab durable and visible: a row, a record.

        What someone else published first is dropped. On `RecordError` nothing is
        visible, and the rows are free again. `written_today` is the day and its
        bytes, to be kept with the records.
        """
        try:
            if self.durability == "sync":
                self.file.sync()
            self._commit(rows, records, written_today)
        except RecordError:
            with self.lock:
                self.table.abandon(rows)
            raise

    def _commit(
        self, rows: Sequence[int], records: RecordRows, written_today: tuple[int, int]
    ) -> None:
        puts = list(map(Put, records["offset"].tolist(), seal(records)))
        keys = names(records["key"])
        with self.commits:
            with self.lock:
                held = self.table.slots.find(keys)
            first: dict[Key, int] = {}
            for place, (key, row) in enumerate(zip(keys, held, strict=True)):
                if row is None:
                    first.setdefault(key, place)
            fresh = list(first.values())
            late = sorted(set(range(len(keys))).difference(fresh))
            self.records.put([puts[place] for place in fresh], written_today)
            with self.lock:
                self.table.abandon([rows[place] for place in late])
                self.table.publish(
                    np.array([rows[place] for place in fresh], dtype=np.int64), records[fresh]
                )

    def release(self, rows: Rows) -> None:
        """EVICTING rows: first their records go, and only then their extents are free.

        When the records cannot be changed the extents stay taken for good, and the
        tier takes no more blocks.
        """
        if not len(rows):
            return
        with self.commits:
            with self.lock:
                offsets = self.table.slots.index.offset[rows].tolist()
            try:
                self.records.delete(offsets)
            except RecordError as error:
                self.fail("records", error)
                return
            with self.lock:
                self.table.slots.free(rows)

    def delete(self, keys: Sequence[Key]) -> int:
        """Remove blocks; returns how many. Those being read go when the last reader is done."""
        with self.lock:
            rows = {row for row in self.table.find(keys) if row is not None}
            evicting = self.table.condemn(rows)
        self.release(evicting)
        return len(rows)

    def fail(self, reason: str, error: Exception | str) -> None:
        """Stop writing: the medium refuses. What is there is still served."""
        with self.lock:
            self.counters[f"failures_{reason}"] += 1
            if self.failure is None:
                self.failure = reason
                # Its text: a log that keeps an error keeps its frames, and their buffers.
                path, text = self._directory.path, str(error)
                log.error("%s: %s; nothing is written here any more", path, text)

    def close(self) -> None:
        """Write down what was used, and let go of everything. No reads or writes may run."""
        try:
            with self.lock:
                puts = self.table.touched()
            if puts:
                self.records.put(puts)
        except RecordError as error:
            log.warning("%s: order of use is not kept: %s", self._directory.path, error)
        finally:
            self.records.close()
            self.file.close()
            self._directory.close()

    def check_invariants(self) -> None:
        """Raises InvariantError unless table and LMDB agree. No reads or writes may run."""
        with self.commits, self.lock:
            self.table.check_invariants()
            index = self.table.slots.index
            offsets, records = self.records.load()
            resident = index.state == State.RESIDENT
            if (
                set(offsets.tolist()) != set(index.offset[resident].tolist())
                and self.failure is None
            ):
                raise InvariantError("the records on the disk are not those of the table")
            if not records.intact.all():
                raise InvariantError("a record on the disk is damaged")


def room_of(namespaces: Iterable[Namespace]) -> int:
    """What these take of the records' file: its pages are half full at worst."""
    return sum(2 * len(namespace.to_json()) for namespace in namespaces)

"""Writing batches of blocks to an NVMe slab: bytes first, records second, visible last."""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvstore.admission import Admission, WriteBudget
from kvstore.allocator import align_up
from kvstore.codec import codec
from kvstore.frame import checksum
from kvstore.tier import Record, Refusal, WriteItem, WriteResult
from kvstore.tiers.blockfile import PASSING_ERRORS, Block
from kvstore.tiers.nvme_records import FullError, RecordError
from kvstore.tiers.nvme_rows import describe, fits_a_row
from kvstore.tiers.nvme_slab import Slab


@dataclass(slots=True)
class _Draft:
    """A block on its way to the slab."""

    number: int  # of the item
    record: Record
    data: memoryview  # what will be stored
    row: int = -1
    offset: int = -1
    checksum: int = -1  # known when the bytes are in the slab


@dataclass(slots=True)
class _Batch:
    """One `write` in progress."""

    items: Sequence[WriteItem]
    results: list[WriteResult | None]
    held: set[int] = field(default_factory=set)  # rows that this very batch wants kept

    def refuse(self, drafts: Iterable[_Draft], refusal: Refusal) -> None:
        for draft in drafts:
            self.results[draft.number] = WriteResult(refusal)


class Writes:
    """Everything that happens to a block between `write` and being found."""

    def __init__(
        self, slab: Slab, codec_name: str, admission: Admission, budget: WriteBudget
    ) -> None:
        self._slab = slab
        self._codec_name = codec_name
        self._admission = admission
        self._budget = budget

    def used(self, keys: Sequence[bytes]) -> None:
        """Tell the admission rule. The slab's lock is held."""
        self._admission.used(keys)

    @property
    def daily_bytes(self) -> int | None:
        """What may be written in a day; None: any number."""
        return self._budget.daily_bytes

    def written_today(self, now_s: float) -> int:
        """Bytes. The slab's lock is held."""
        self._budget.turn(now_s)
        return self._budget.written_bytes

    def write(self, items: Sequence[WriteItem], now_s: float) -> list[WriteResult]:
        """Blocks; runs in a worker thread. Checksums are made while blocks are on their way."""
        batch = _Batch(items, [None] * len(items))
        placed = self._place(batch, self._encode(self._select(batch, now_s)), now_s)
        written = self._store(batch, placed)
        if written:
            self._publish(batch, written)
        with self._slab.lock:
            counters = self._slab.counters
            for result in batch.results:
                if result is not None and result.refusal is not None:
                    counters[f"refused_{result.refusal.value}"] += 1
        return [result or WriteResult(None) for result in batch.results]

    def _select(self, batch: _Batch, now_s: float) -> list[_Draft]:
        """What is new here and worth a write."""
        drafts = []
        with self._slab.lock:
            held = self._slab.table.find([item.record.key for item in batch.items])
            batch.held = {row for row in held if row is not None}
            for number, (item, row) in enumerate(zip(batch.items, held, strict=True)):
                record = item.record
                if not (0 < record.raw_bytes <= item.buffer.nbytes and fits_a_row(record)):
                    refusal: Refusal | None = Refusal.INVALID
                elif row is not None:
                    refusal = None
                elif self._slab.failure is not None:
                    refusal = Refusal.READ_ONLY
                elif self._slab.table.is_leaving(record.key):
                    refusal = Refusal.FULL
                elif not self._admission.admits(record.key, record.priority):
                    refusal = Refusal.ADMISSION
                elif not self._budget.take(record.raw_bytes, now_s):
                    refusal = Refusal.BUDGET
                else:
                    data = item.buffer.cast("B")[: record.raw_bytes]
                    drafts.append(_Draft(number, record, data))
                    continue
                batch.results[number] = WriteResult(refusal)
        return drafts

    def _encode(self, drafts: list[_Draft]) -> list[_Draft]:
        if self._codec_name == "raw":
            return drafts
        for draft in drafts:
            namespace = self._slab.namespaces.get(draft.record.namespace)
            dtype = namespace.kv_dtype if namespace else "bfloat16"
            draft.data = codec(self._codec_name, dtype).encode(draft.data)
        return drafts

    def _place(self, batch: _Batch, drafts: list[_Draft], now_s: float) -> list[_Draft]:
        """Give every draft a row; those of one size lie together."""
        alike: defaultdict[tuple[int, int], list[_Draft]] = defaultdict(list)
        for draft in drafts:
            alike[align_up(draft.data.nbytes), draft.record.priority].append(draft)
        placed: list[_Draft] = []
        for (size, priority), group in alike.items():
            rows = self._take(size, len(group), priority, batch.held, now_s)
            refused = group[len(rows) :]
            batch.refuse(refused, Refusal.FULL)
            with self._slab.lock:
                self._budget.give_back(sum(draft.record.raw_bytes for draft in refused))
                index = self._slab.table.slots.index
                for draft, row in zip(group, rows, strict=False):
                    draft.row, draft.offset = row, index.offset.item(row)
                    index.nbytes[row] = draft.data.nbytes
            placed += group[: len(rows)]
        return placed

    def _take(
        self, size: int, count: int, priority: int, keep: set[int], now_s: float
    ) -> list[int]:
        """Up to `count` reserved rows, made room for by evicting what has no better claim."""
        slab = self._slab
        rows: list[int] = []
        while True:
            with slab.lock:
                rows += slab.table.reserve(size, count - len(rows)).tolist()
                missing = count - len(rows)
                if not missing or slab.failure is not None:
                    return rows
                victims = slab.table.victims(size, missing, priority, now_s, keep)
                slab.counters["evicted_blocks"] += len(victims)
            if not len(victims):
                return rows
            slab.release(victims)

    def _store(self, batch: _Batch, drafts: list[_Draft]) -> list[_Draft]:
        """Write the bytes; what the medium refuses is given back."""
        written: list[_Draft] = []
        failed: dict[int, int] = {}  # place -> errno

        def arrived(place: int, error: int) -> None:
            if error:
                failed[place] = error
                return
            draft = drafts[place]
            draft.checksum = checksum(draft.data)
            written.append(draft)

        self._slab.file.write([Block(draft.offset, draft.data) for draft in drafts], arrived)
        if failed:
            lost = [drafts[place] for place in failed]
            batch.refuse(lost, Refusal.IO_ERROR)
            with self._slab.lock:
                self._slab.counters["write_errors"] += len(lost)
                self._slab.table.abandon([draft.row for draft in lost])
            for error in set(failed.values()) - PASSING_ERRORS:
                self._slab.fail(errno.errorcode[error].lower(), os.strerror(error))
        # As they were given, not as they arrived: of one key in a batch the first is kept.
        return sorted(written, key=lambda draft: draft.number)

    def _publish(self, batch: _Batch, written: list[_Draft]) -> None:
        """Records, then table. What cannot be recorded was not written."""
        slab = self._slab
        records = describe(
            [draft.record for draft in written],
            codec=self._codec_name,
            offsets=[draft.offset for draft in written],
            stored_bytes=[draft.data.nbytes for draft in written],
            checksums=[draft.checksum for draft in written],
        )
        with slab.lock:
            written_today = (self._budget.day, self._budget.written_bytes)
        try:
            slab.publish([draft.row for draft in written], records, written_today)
        except FullError:
            batch.refuse(written, Refusal.FULL)
        except RecordError as error:
            batch.refuse(written, Refusal.IO_ERROR)
            slab.fail("records", error)
        else:
            with slab.lock:
                slab.counters["written_blocks"] += len(written)
                slab.counters["written_bytes"] += int(records["stored_bytes"].sum())

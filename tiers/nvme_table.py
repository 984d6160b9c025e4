"""What an NVMe tier knows of its blocks in memory: slots, and beside each row its record."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import InvariantError
from kvstore.frame import RECORD_DTYPE, Records, names
from kvstore.hashing import Key
from kvstore.histogram import AGE_BOUNDS_S, Histogram
from kvstore.index import State
from kvstore.policy import Rows
from kvstore.slots import Batch, SlotTable, StoredBlocks
from kvstore.tier import Record
from kvstore.tiers.nvme_records import Put
from kvstore.tiers.nvme_rows import RecordRows, seal, undescribe


class BlockTable:
    """A `SlotTable` bounded in rows as well, with the whole record of each block.

    Priority and expiry are the slot table's; all else of a record is here, as it
    stands on the disk. Not thread-safe; no I/O.
    """

    def __init__(self, slab_bytes: int, max_blocks: int) -> None:
        self.slots = SlotTable(slab_bytes)
        self.max_blocks = max_blocks
        self.eviction_age_s = Histogram(AGE_BOUNDS_S)  # since the last use, of what made room
        self._reserved = 0
        self._records: NDArray[np.void] = np.zeros(0, RECORD_DTYPE)
        self._touched: NDArray[np.bool_] = np.zeros(0, dtype=bool)
        self._doomed: set[int] = set()  # deleted or damaged while someone was reading them
        self._fit()

    def load(self, offsets: NDArray[np.uint64], records: Records) -> list[int]:
        """Fill an empty table with what was found on the disk.

        Returns the offsets whose records must go: damaged, out of place, beyond
        the slab's end, in each other's way, or too many (the least recently used).
        """
        rows = records.rows
        capacity = self.slots.space.capacity_bytes
        sound = records.intact & (rows["offset"] == offsets) & (rows["has_checksum"] == 1)
        sound &= (rows["raw_bytes"] > 0) & (rows["stored_bytes"] > 0)
        # One by one: the sum of absurd numbers would wrap around.
        sound &= (rows["offset"] < capacity) & (rows["stored_bytes"] <= capacity)
        order = np.flatnonzero(sound)
        order = order[np.argsort(rows["last_use_s"][order], kind="stable")]
        keys = names(rows["key"][order])
        if len(set(keys)) < len(keys):
            order = order[sorted({key: place for place, key in enumerate(keys)}.values())]
        if len(order) < len(keys) or len(order) > self.max_blocks:
            order = order[-self.max_blocks :]
            keys = names(rows["key"][order])
        kept = self.slots.load(
            StoredBlocks(
                keys=keys,
                parents=names(rows["parent"][order]),
                namespaces=names(rows["namespace"][order]),
                offsets=rows["offset"][order].astype(np.int64),
                nbytes=rows["stored_bytes"][order].astype(np.int64),
                priorities=rows["priority"][order],
                expires_s=rows["expires_s"][order],
            )
        )
        order = order[np.array(kept, dtype=bool)]
        self._fit()
        np.take(rows, order, out=self._records[: len(order)], mode="clip")
        gone = np.ones(len(offsets), dtype=bool)
        gone[order] = False
        dropped: list[int] = offsets[gone].tolist()
        return dropped

    # ---- finding

    def find(self, keys: Sequence[Key]) -> list[int | None]:
        """Row of each block that may be served."""
        rows = self.slots.find(keys)
        if self._doomed:
            return [None if row in self._doomed else row for row in rows]
        return rows

    def is_leaving(self, key: Key) -> bool:
        """Whether a condemned block of this key is still being read: until then none can come."""
        return bool(self._doomed) and self.slots.index.rows_by_key.get(key) in self._doomed

    def records(self, rows: Sequence[int]) -> list[Record]:
        """What is known of these blocks."""
        array = np.array(rows, dtype=np.int64)
        index = self.slots.index
        priorities, expires_s = index.priority[array].tolist(), index.expires_s[array].tolist()
        return undescribe(self._records[array], priorities, expires_s)

    def page(self, start: int, stop: int) -> RecordRows:
        """What is known of the blocks in rows `[start, stop)`; seals are not made up."""
        index = self.slots.index
        rows = np.flatnonzero(index.state[start:stop] == State.RESIDENT) + start
        if self._doomed:
            rows = rows[[row not in self._doomed for row in rows.tolist()]]
        records = self._records[rows]
        records["priority"], records["expires_s"] = index.priority[rows], index.expires_s[rows]
        return records

    def touch(self, rows: Sequence[int], now_s: float) -> None:
        """These blocks were used."""
        array = np.array(rows, dtype=np.int64)
        self.slots.touch(array)
        self._records["last_use_s"][array] = now_s
        self._touched[array] = True

    # ---- the life of a block

    def reserve(self, nbytes: int, count: int) -> Rows:
        """Up to `count` rows of `nbytes`, from what is free."""
        room = self.max_blocks - len(self.slots) - self._reserved
        rows = self.slots.reserve(nbytes, max(0, min(count, room)))
        self._reserved += len(rows)
        self._fit()
        return rows

    def abandon(self, rows: Sequence[int]) -> None:
        """RESERVED -> FREE."""
        self._reserved -= len(rows)
        self.slots.free(np.array(rows, dtype=np.int64))

    def publish(self, rows: Rows, records: RecordRows) -> None:
        """RESERVED -> RESIDENT. The keys must be distinct, and none resident."""
        keys, parents = names(records["key"]), names(records["parent"])
        groups: dict[tuple[bytes, int], list[int]] = {}
        claims = zip(names(records["namespace"]), records["priority"].tolist(), strict=True)
        for place, claim in enumerate(claims):
            groups.setdefault(claim, []).append(place)
        for (namespace, priority), places in groups.items():
            batch = Batch(
                namespace, [keys[i] for i in places], [parents[i] for i in places], priority
            )
            if not all(self.slots.commit(rows[places], batch)):
                raise InvariantError("a block was published twice")
        self._reserved -= len(rows)
        self._records[rows] = records
        self._touched[rows] = False
        for place in np.flatnonzero(records["expires_s"]).tolist():
            self.slots.expire_at(rows[place : place + 1], float(records["expires_s"][place]))

    def victims(self, nbytes: int, count: int, priority: int, now_s: float, keep: set[int]) -> Rows:
        """Evict what has no better claim, to make room for `count` blocks of `nbytes`.

        At least one if there is one at all, be it bytes or rows that are short.
        """
        rows = self.slots.victims(nbytes, count, priority, now_s, keep)
        self.eviction_age_s.add_all(now_s - self._records["last_use_s"][rows])
        return rows

    def condemn(self, rows: Iterable[int]) -> Rows:
        """RESIDENT -> EVICTING, where nobody is reading; the others follow with `unpin`."""
        distinct = sorted(set(rows))
        pins = self.slots.index.pins
        free = [row for row in distinct if not pins[row]]
        self._doomed.update(row for row in distinct if pins[row])
        array = np.array(free, dtype=np.int64)
        self.slots.evict(array)
        return array

    def unpin(self, rows: Rows, now_s: float) -> Rows:
        """End a read. Returns rows now EVICTING because they were condemned meanwhile."""
        self.slots.unpin(rows, now_s)
        if not self._doomed:
            return np.zeros(0, dtype=np.int64)
        pins = self.slots.index.pins
        over = {row for row in rows.tolist() if row in self._doomed and not pins[row]}
        self._doomed -= over
        return self.condemn(over)

    # ---- what is to be written down

    def retain(
        self, rows: Sequence[int], priority: int, expires_s: float, now_s: float
    ) -> list[Put]:
        """Set priority and expiry (0: never); returns the records to write down."""
        array = np.array(rows, dtype=np.int64)
        self.slots.retain(array, priority, 0.0, now_s)
        if expires_s:
            self.slots.expire_at(array, expires_s)
        self._records["priority"][array] = self.slots.index.priority[array]
        self._records["expires_s"][array] = self.slots.index.expires_s[array]
        return self._sealed(array)

    def touched(self) -> list[Put]:
        """Records that were used since they were last written down."""
        rows = np.flatnonzero(self._touched & (self.slots.index.state == State.RESIDENT))
        self._touched[:] = False
        return self._sealed(rows)

    def _sealed(self, rows: Rows) -> list[Put]:
        return list(map(Put, self.slots.index.offset[rows].tolist(), seal(self._records[rows])))

    def _fit(self) -> None:
        """Give the records as many rows as the index has."""
        missing = len(self.slots.index.state) - len(self._records)
        if missing > 0:
            self._records = np.concatenate([self._records, np.zeros(missing, RECORD_DTYPE)])
            self._touched = np.concatenate([self._touched, np.zeros(missing, dtype=bool)])

    def check_invariants(self) -> None:
        """Raises InvariantError where slots and records contradict each other."""
        self.slots.check_invariants()
        index = self.slots.index
        reserved = int((index.state == State.RESERVED).sum())
        if reserved != self._reserved or len(self.slots) + reserved > self.max_blocks:
            raise InvariantError(f"{reserved} rows reserved, {self._reserved} by count")
        resident = index.rows_by_key
        records = self.records(list(resident.values()))
        for (key, row), record in zip(resident.items(), records, strict=True):
            if record.key != key or record.namespace != self.slots.namespace(row):
                raise InvariantError(f"the record of row {row} is of another block")
            if record.stored_bytes != index.nbytes[row]:
                raise InvariantError(f"row {row} holds {index.nbytes[row]} bytes, not as recorded")
        if any(not index.pins[row] for row in self._doomed):
            raise InvariantError("a condemned block is still there, and nobody reads it")

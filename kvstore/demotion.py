"""Write-behind: committed blocks go down to the lower tier without anyone waiting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from kvstore.background import BackgroundLoop
from kvstore.errands import Errands
from kvstore.errors import InvariantError, TierError, TierFullError
from kvstore.hub import Hub
from kvstore.identity import Namespace
from kvstore.index import State
from kvstore.tier import LocalTier, Record, Refusal, WriteItem, WriteResult
from kvstore.transfer import Transfers


class Batch(NamedTuple):
    """What is written in one call: rows, and the record of each."""

    rows: list[int]
    records: list[Record]
    queued_s: list[float]  # when each was, by the monotonic clock
    namespaces: list[Namespace]  # that the tier may not know yet


class Demotions:
    """Blocks on their way to one lower tier. State is guarded by the hub's lock.

    A queued block is pinned: it leaves RAM only once it is safe below, or was
    refused there. So is one being written, unless the caller evicts it: then it
    is found no more, and its slot is given back when the tier is done with it.
    """

    def __init__(
        self,
        hub: Hub,
        tier: LocalTier,
        loop: BackgroundLoop,
        transfers: Transfers,
        errands: Errands,
    ) -> None:
        self._hub = hub
        self._tier = tier
        self._loop = loop
        self._transfers = transfers
        self._errands = errands
        self._queue: dict[int, float] = {}  # row -> since when, oldest first
        self._in_flight: set[int] = set()
        self._withdrawn: set[int] = set()  # of those in flight: evicted by the caller
        self._most_writers = hub.bounds.transfers_in_flight
        self._writers = 0
        self._starting = False  # one of them has yet to look at the queue; it starts the next
        self._known: set[bytes] = set()  # namespaces that the tier remembers

    @property
    def idle(self) -> bool:
        """Whether nothing is being written, but for calls that were given up."""
        return not self._writers

    def waiting_locked(self) -> int:
        """Blocks that are queued, and not yet being written."""
        return len(self._queue)

    def room_locked(self) -> int:
        """How many more blocks may be queued."""
        return max(0, self._hub.bounds.demotion_queue_blocks - len(self._queue))

    def offer_locked(self, rows: list[int]) -> None:
        """Queue resident rows. What is beyond the bound stays in RAM only, and is counted.

        So does everything while the tier keeps failing: it must not hold RAM.
        """
        counters = self._hub.counters
        if not self._transfers.allows():
            counters["demotions_failed_blocks"] += len(rows)
            return
        fresh = [row for row in rows if row not in self._queue and row not in self._in_flight]
        taken = fresh[: self.room_locked()]
        counters["demotions_dropped_blocks"] += len(fresh) - len(taken)
        if taken:
            self._hub.slots.pin(np.array(taken, dtype=np.int64))
            self._queue.update(dict.fromkeys(taken, self._hub.clock.monotonic_s()))
            self.start_locked()

    def start_locked(self) -> None:
        """See to it that what is queued is being written."""
        if self._queue and not self._starting and self._writers < self._most_writers:
            self._starting = True
            self._writers += 1
            self._loop.spawn(self._write_until_empty())

    def withdraw_locked(self, rows: Iterable[int]) -> None:
        """The caller is about to evict these rows: no longer wanted below, no longer pinned here.

        What is being written is deleted there as soon as it is written; where a
        lease holds it as well, it stays pinned until then.
        """
        waiting = [row for row in rows if row in self._queue]
        writing = [row for row in rows if row in self._in_flight]
        for row in waiting:
            del self._queue[row]
        self._withdrawn.update(writing)
        index = self._hub.slots.index
        self._errands.hide_locked([key for row in writing if (key := index.keys[row]) is not None])
        self._unpin_locked(waiting + [row for row in writing if index.pins.item(row) == 1])

    def drop_queue_locked(self) -> int:
        """What waits is not written, and no longer pinned; returns how many blocks that are."""
        rows = list(self._queue)
        self._queue.clear()
        self._hub.counters["demotions_dropped_blocks"] += len(rows)
        self._unpin_locked(rows)
        return len(rows)

    def is_writing_locked(self, row: int) -> bool:
        """Whether the tier may still be reading the slot."""
        return row in self._in_flight

    async def _write_until_empty(self) -> None:
        while True:
            with self._hub.lock:
                self._starting = False
                batch = self._next_locked()
                if batch is None:
                    self._writers -= 1
                    self._hub.notify_locked()
                    return
                self.start_locked()
            await self._transfers.run(partial(self._write, batch), partial(self._land, batch))

    def _next_locked(self) -> Batch | None:
        hub, index = self._hub, self._hub.slots.index
        # A block that is evicted and committed again is written after the old one is deleted.
        hidden = self._errands.hidden
        rows: list[int] = []
        nbytes = 0
        for row in self._queue:
            if hidden and index.keys[row] in hidden:
                continue
            nbytes += index.nbytes.item(row)
            if rows and nbytes > hub.bounds.transfer_bytes:
                break
            rows.append(row)
        if not rows:
            return None
        queued_s = [self._queue.pop(row) for row in rows]
        self._in_flight.update(rows)
        now_s = hub.clock.wall_s()
        records = [self._record_locked(row, now_s) for row in rows]
        fresh = {record.namespace for record in records} - self._known
        namespaces = [hub.namespaces[fingerprint] for fingerprint in fresh]
        return Batch(rows, records, queued_s, namespaces)

    def _record_locked(self, row: int, now_s: float) -> Record:
        index = self._hub.slots.index
        key = index.keys[row]
        assert key is not None
        return Record(
            namespace=self._hub.slots.namespace(row),
            key=key,
            parent=index.parents[row],
            raw_bytes=index.nbytes.item(row),
            created_s=now_s,
            last_use_s=now_s,
            priority=index.priority.item(row),
            expires_s=self._expires_locked(row, now_s),
        )

    def _expires_locked(self, row: int, now_s: float) -> float:
        """The clock of a TTL stands still in RAM while the block is in use; below it runs."""
        index = self._hub.slots.index
        ttl_s = index.ttl_s.item(row)
        return now_s + ttl_s if ttl_s else index.expires_s.item(row)

    async def _write(self, batch: Batch) -> list[WriteResult]:
        nameless = await self._remember(batch.namespaces)
        views = self._hub.readables(np.array(batch.rows, dtype=np.int64))
        items = [WriteItem(*item) for item in zip(batch.records, views, strict=True)]
        refused = dict.fromkeys(self._hub.damaged_among(batch.rows), Refusal.INVALID)
        for row, record in zip(batch.rows, batch.records, strict=True):
            if record.namespace in nameless:
                refused[row] = Refusal.FULL
        sound = [item for row, item in zip(batch.rows, items, strict=True) if row not in refused]
        written = await self._tier.write(sound)
        if len(written) != len(sound):
            raise TierError(f"{len(written)} answers to {len(sound)} writes")
        results = iter(written)
        return [
            WriteResult(refused[row]) if row in refused else next(results) for row in batch.rows
        ]

    async def _remember(self, namespaces: Sequence[Namespace]) -> set[bytes]:
        """Fingerprints of those for which the tier has no room. It is well, and goes on."""
        names = {namespace.fingerprint for namespace in namespaces}
        try:
            if names:
                await self._tier.remember(namespaces)
        except TierFullError:
            return names
        self._known |= names
        return set()

    def _land(self, batch: Batch, results: list[WriteResult] | None) -> None:
        """The tier is done with the slots, whatever became of the blocks."""
        hub, index = self._hub, self._hub.slots.index
        with hub.lock:
            self._in_flight.difference_update(batch.rows)
            evicted = [row for row in batch.rows if index.state[row] == State.EVICTING]
            hub.slots.free(np.array(evicted, dtype=np.int64))
            self._unpin_locked([row for row in batch.rows if row not in evicted])
            withdrawn = self._withdrawn.intersection(batch.rows)
            if withdrawn:
                self._withdrawn -= withdrawn
                pairs = zip(batch.rows, batch.records, strict=True)
                self._errands.delete_locked([r.key for row, r in pairs if row in withdrawn])
            self._count_locked(batch, results)
            hub.notify_locked()

    def _count_locked(self, batch: Batch, results: list[WriteResult] | None) -> None:
        counters, index = self._hub.counters, self._hub.slots.index
        if results is None:
            counters["demotions_failed_blocks"] += len(batch.rows)
            return
        now_s = self._hub.clock.monotonic_s()
        for row, record, queued_s, result in zip(*batch[:3], results, strict=True):
            if result.refusal is not None:
                counters[f"demotions_refused_{result.refusal.value}_blocks"] += 1
                continue
            counters["demoted_blocks"] += 1
            counters["demoted_bytes"] += record.raw_bytes
            self._hub.demotion_s.add(now_s - queued_s)
            if index.keys[row] != record.key:
                continue
            priority = index.priority.item(row)
            asked = priority, self._expires_locked(row, record.created_s)
            if asked != (record.priority, record.expires_s):  # retained while being written
                expires_s = self._expires_locked(row, self._hub.clock.wall_s())
                self._errands.retain_locked([record.key], priority, expires_s)

    def _unpin_locked(self, rows: list[int]) -> None:
        self._hub.slots.unpin(np.array(rows, dtype=np.int64), self._hub.clock.wall_s())

    def check_invariants_locked(self) -> None:
        """Raises InvariantError unless what is queued or being written is held in RAM."""
        index = self._hub.slots.index
        for row in self._queue.keys() | self._in_flight:
            leaving = index.state[row] == State.EVICTING and row in self._withdrawn
            if not leaving and (index.state[row] != State.RESIDENT or not index.pins[row]):
                raise InvariantError(f"row {row} is to be written below, but is not pinned")
        if self._queue.keys() & self._in_flight or not self._withdrawn <= self._in_flight:
            raise InvariantError("a row is both queued and being written")

"""Write-behind: committed blocks go down to the lower tier without anyone waiting."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np

from kvstore.background import BackgroundLoop
from kvstore.breaker import Breaker
from kvstore.hashing import Key
from kvstore.hub import Hub
from kvstore.identity import Namespace
from kvstore.tier import LocalTier, Record, Refusal, WriteItem, WriteResult

log = logging.getLogger(__name__)


class Demotions:
    """Blocks on their way to one lower tier. State is guarded by the hub's lock.

    A queued block is pinned: it leaves RAM only once it is safe below, or was
    refused there.
    """

    def __init__(self, hub: Hub, tier: LocalTier, loop: BackgroundLoop, breaker: Breaker) -> None:
        self._hub = hub
        self._tier = tier
        self._loop = loop
        self._breaker = breaker
        self._queue: dict[int, None] = {}  # rows, oldest first
        self._in_flight: set[int] = set()
        self._writers = 0
        self._known: set[bytes] = set()  # namespaces that the tier remembers
        self._doomed: set[Key] = set()  # evicted by the caller while being written

    @property
    def idle(self) -> bool:
        return not self._writers

    def room_locked(self) -> int:
        """How many more blocks may be queued."""
        return max(0, self._hub.bounds.demotion_queue_blocks - len(self._queue))

    def offer_locked(self, rows: list[int]) -> None:
        """Queue resident rows; what is beyond the bound stays in RAM only, and is counted."""
        fresh = [row for row in rows if row not in self._queue and row not in self._in_flight]
        taken = fresh[: self.room_locked()]
        self._hub.counters["demotions_dropped_blocks"] += len(fresh) - len(taken)
        if not taken:
            return
        self._hub.slots.pin(np.array(taken, dtype=np.int64))
        self._queue.update(dict.fromkeys(taken))
        wanted = min(len(self._queue), self._hub.bounds.transfers_in_flight)
        while self._writers < wanted:
            self._writers += 1
            self._loop.spawn(self._write_until_empty())

    def withdraw_locked(self, rows: Iterable[int]) -> None:
        """Take rows that the caller evicts out of the queue; those in flight die on landing."""
        waiting = [row for row in rows if row in self._queue]
        for row in waiting:
            del self._queue[row]
        self._hub.slots.unpin(np.array(waiting, dtype=np.int64), self._hub.clock.wall_s())
        keys = self._hub.slots.index.keys
        self._doomed.update(key for row in rows if row in self._in_flight and (key := keys[row]))

    async def _write_until_empty(self) -> None:
        hub = self._hub
        while True:
            with hub.lock:
                rows, items, namespaces = self._next_locked()
                if not rows:
                    self._writers -= 1
                    hub.changed.notify_all()
                    return
            results = await self._write(items, namespaces)
            items.clear()
            with hub.lock:
                self._land_locked(rows, results)
                doomed = list(self._doomed)
                self._doomed.clear()
                hub.changed.notify_all()
            if doomed:
                await self._tier.delete(doomed)

    def _next_locked(self) -> tuple[list[int], list[WriteItem], list[Namespace]]:
        hub, index = self._hub, self._hub.slots.index
        rows: list[int] = []
        nbytes = 0
        for row in self._queue:
            nbytes += index.nbytes.item(row)
            if rows and nbytes > hub.bounds.transfer_bytes:
                break
            rows.append(row)
        for row in rows:
            del self._queue[row]
        self._in_flight.update(rows)
        now_s = hub.clock.wall_s()
        views = hub.readables(rows)
        items = [
            WriteItem(self._record_locked(row, now_s), view)
            for row, view in zip(rows, views, strict=True)
        ]
        fresh = {item.record.namespace for item in items} - self._known
        return rows, items, [hub.namespaces[fingerprint] for fingerprint in fresh]

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
            expires_s=index.expires_s.item(row),
        )

    async def _write(
        self, items: list[WriteItem], namespaces: list[Namespace]
    ) -> list[WriteResult]:
        now_s = self._hub.clock.monotonic_s()
        if not self._breaker.allows(now_s):
            return [WriteResult(Refusal.READ_ONLY)] * len(items)
        try:
            if namespaces:
                await self._tier.remember(namespaces)
                self._known.update(namespace.fingerprint for namespace in namespaces)
            results = await self._tier.write(items)
            self._breaker.succeeded()
        except Exception as error:
            # A tier that fails as a whole costs hits, never a request.
            log.warning("writing %d blocks to %s: %s", len(items), self._tier.name, error)
            self._breaker.failed(now_s)
            results = [WriteResult(Refusal.IO_ERROR)] * len(items)
        return results

    def _land_locked(self, rows: list[int], results: list[WriteResult]) -> None:
        hub = self._hub
        for result in results:
            if result.refusal is None:
                hub.counters["demoted_blocks"] += 1
            else:
                hub.counters[f"demotions_refused_{result.refusal.value}_blocks"] += 1
        self._in_flight.difference_update(rows)
        hub.slots.unpin(np.array(rows, dtype=np.int64), hub.clock.wall_s())
        keys, pins = hub.slots.index.keys, hub.slots.index.pins
        dead = [row for row in rows if keys[row] in self._doomed and not pins[row]]
        if dead:
            array = np.array(dead, dtype=np.int64)
            hub.slots.evict(array)
            hub.slots.free(array)

"""Bringing blocks up into RAM: each once, however many ask."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import numpy as np

from kvstore.answers import NVME
from kvstore.background import BackgroundLoop
from kvstore.errors import InvariantError, TierError
from kvstore.hashing import Chain, Key
from kvstore.hub import Hub
from kvstore.identity import Namespace
from kvstore.lease import Fill
from kvstore.policy import Rows
from kvstore.retention import DEFAULT_PRIORITY
from kvstore.tier import LocalTier, Miss, ReadRequest, ReadResult
from kvstore.transfer import Transfers


class Promotions:
    """Fills in flight from one lower tier. State is guarded by the hub's lock."""

    def __init__(
        self, hub: Hub, tier: LocalTier, loop: BackgroundLoop, transfers: Transfers
    ) -> None:
        self._hub = hub
        self._tier = tier
        self._loop = loop
        self._transfers = transfers
        self._turns = asyncio.Semaphore(hub.bounds.transfers_in_flight)
        self._rows: set[int] = set()  # that the tier may be writing into
        self._read_bytes = 0  # ever, for the cost of reading
        self.fills: dict[Key, Fill] = {}  # that may still come
        self.queued_bytes = 0  # of `_rows`

    def room_locked(self, nbytes: int) -> int:
        """How many more blocks of `nbytes` may be in flight."""
        return max(0, self._hub.bounds.promotion_queue_bytes - self.queued_bytes) // nbytes

    def begin_locked(
        self, chain: Chain, wanted: Sequence[int], keep: Sequence[int | None]
    ) -> list[Fill]:
        """Start reading the blocks at positions `wanted`, in order, as far as there is room.

        None of them may be in flight already. Room is not made at the cost of
        the rows `keep`.
        """
        nbytes = chain.namespace.layout.block_bytes
        count = min(len(wanted), self.room_locked(nbytes))
        rows = self._hub.take_slots_locked(nbytes, count, DEFAULT_PRIORITY, keep)
        fingerprint = chain.namespace.fingerprint
        fills = [
            Fill(fingerprint, chain.keys[i], chain.keys[i - 1] if i else chain.parent, row, NVME)
            for i, row in zip(wanted, rows.tolist(), strict=False)
        ]
        if fills:
            self.fills.update((fill.key, fill) for fill in fills)
            self._rows.update(rows.tolist())
            self.queued_bytes += len(fills) * nbytes
            self._loop.spawn(self._read_all(chain.namespace, fills))
        return fills

    def drop_locked(self, fill: Fill, miss: Miss) -> None:
        """Whoever waits for it misses it; its slot is given back when the tier is done with it."""
        del self.fills[fill.key]
        fill.done, fill.miss = True, miss

    async def _read_all(self, namespace: Namespace, fills: list[Fill]) -> None:
        nbytes = namespace.layout.block_bytes
        step = max(1, self._hub.bounds.transfer_bytes // nbytes)
        parts = [fills[i : i + step] for i in range(0, len(fills), step)]
        started_s, before_bytes = self._hub.clock.monotonic_s(), self._read_bytes
        await asyncio.gather(*(self._read(namespace, part, started_s) for part in parts))
        # What was read meanwhile for others took its share of the time, so it counts as well.
        if self._read_bytes > before_bytes:
            elapsed_s = self._hub.clock.monotonic_s() - started_s
            self._hub.costs[NVME].observe(1.0, float(self._read_bytes - before_bytes), elapsed_s)

    async def _read(self, namespace: Namespace, fills: list[Fill], asked_s: float) -> None:
        rows = np.array([fill.row for fill in fills], dtype=np.int64)

        async def read() -> list[ReadResult]:
            requests = [
                ReadRequest(fill.key, namespace.fingerprint, len(view), view)
                for fill, view in zip(fills, self._hub.writables(rows), strict=True)
            ]
            results = await self._tier.read(requests)
            if len(results) != len(requests):
                raise TierError(f"{len(results)} answers to {len(requests)} reads")
            return results

        async with self._turns:
            landed = partial(self._land, namespace, fills, rows, asked_s)
            in_time = await self._transfers.run(read, landed)
        if not in_time:
            with self._hub.lock:
                for fill in fills:
                    if not fill.done:
                        self.drop_locked(fill, Miss.BREAKER)
                self._hub.notify_locked()

    def _land(
        self,
        namespace: Namespace,
        fills: list[Fill],
        rows: Rows,
        asked_s: float,
        results: list[ReadResult] | None,
    ) -> None:
        """The tier is done with the slots: publish what has come, give back the others."""
        hub = self._hub
        if results is None:
            results = [ReadResult(None, Miss.BREAKER)] * len(fills)
        came = np.array([result.record is not None for result in results])
        sums = hub.sums(rows[came].tolist()) if hub.bounds.verify == "always" else {}
        with hub.lock:
            self._rows.difference_update(rows.tolist())
            nbytes = hub.slots.index.nbytes[rows]
            self.queued_bytes -= int(nbytes.sum())
            self._read_bytes += int(nbytes[came].sum())
            hub.checksums.update(sums)
            by_claim: defaultdict[tuple[int, float], list[Fill]] = defaultdict(list)
            unused: list[int] = []
            for fill, result in zip(fills, results, strict=True):
                if not fill.done and result.record is not None:
                    by_claim[result.record.priority, result.record.expires_s].append(fill)
                    continue
                unused.append(fill.row)
                if not fill.done:
                    self.drop_locked(fill, result.miss or Miss.ABSENT)
                    if result.miss is Miss.CHECKSUM:
                        hub.remember_damaged_locked(fill.key)
            hub.slots.free(np.array(unused, dtype=np.int64))
            took_s = hub.clock.monotonic_s() - asked_s
            for (priority, expires_s), group in by_claim.items():
                hub.promotion_s.add(took_s, len(group))
                self._publish_locked(namespace, group, priority, expires_s)
            hub.notify_locked()

    def _publish_locked(
        self, namespace: Namespace, fills: list[Fill], priority: int, expires_s: float
    ) -> None:
        hub = self._hub
        rows = np.array([fill.row for fill in fills], dtype=np.int64)
        won = hub.publish_locked(
            rows, namespace, [f.key for f in fills], [f.parent for f in fills], priority
        )
        if expires_s:
            hub.slots.expire_at(rows[np.array(won)], expires_s)
        for fill, mine in zip(fills, won, strict=True):
            del self.fills[fill.key]
            fill.done = True
            if not mine:  # a writer committed the same block meanwhile: share its copy
                fill.row = hub.slots.index.rows_by_key[fill.key]
        waited = [fill.row for fill in fills for _ in range(fill.waiters)]
        hub.slots.pin(np.array(waited, dtype=np.int64))
        hub.counters["promoted_blocks"] += len(fills)
        hub.counters["promoted_bytes"] += len(fills) * namespace.layout.block_bytes

    def check_invariants_locked(self) -> None:
        """Raises InvariantError unless the bytes in flight are those of the fills."""
        nbytes = self._hub.slots.index.nbytes
        total = sum(nbytes.item(row) for row in self._rows)
        if total != self.queued_bytes:
            raise InvariantError(f"{self.queued_bytes} bytes in flight, but slots of {total}")
        for key, fill in self.fills.items():
            if fill.key != key or fill.done or fill.row not in self._rows:
                raise InvariantError(f"block {key.hex()} is awaited, but nothing brings it")

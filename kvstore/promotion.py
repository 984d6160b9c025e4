"""Bringing blocks up into RAM: each once, however many ask."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from kvstore.answers import NVME
from kvstore.background import BackgroundLoop
from kvstore.breaker import Breaker
from kvstore.errors import InvariantError
from kvstore.hashing import Chain, Key
from kvstore.hub import Hub
from kvstore.identity import Namespace
from kvstore.lease import Fill
from kvstore.retention import DEFAULT_PRIORITY
from kvstore.tier import LocalTier, Miss, ReadRequest, ReadResult

log = logging.getLogger(__name__)


class Promotions:
    """Fills in flight from one lower tier. State is guarded by the hub's lock."""

    def __init__(self, hub: Hub, tier: LocalTier, loop: BackgroundLoop, breaker: Breaker) -> None:
        self._hub = hub
        self._tier = tier
        self._loop = loop
        self._breaker = breaker
        self._turns = asyncio.Semaphore(hub.bounds.transfers_in_flight)
        self.fills: dict[Key, Fill] = {}
        self.queued_bytes = 0

    def room_locked(self, nbytes: int) -> int:
        """How many more blocks of `nbytes` may be in flight."""
        return max(0, self._hub.bounds.promotion_queue_bytes - self.queued_bytes) // nbytes

    def begin_locked(self, chain: Chain, wanted: Sequence[int]) -> list[Fill]:
        """Reserve slots for the blocks at positions `wanted`, as far as there is room.

        None of them may be in flight already. `start` what comes back.
        """
        nbytes = chain.namespace.layout.block_bytes
        count = min(len(wanted), self.room_locked(nbytes))
        rows = self._hub.take_slots_locked(nbytes, count, DEFAULT_PRIORITY)
        fills = [
            Fill(chain.keys[i], chain.keys[i - 1] if i else chain.parent, row, NVME)
            for i, row in zip(wanted, rows.tolist(), strict=False)
        ]
        self.fills.update((fill.key, fill) for fill in fills)
        self.queued_bytes += len(fills) * nbytes
        return fills

    def start(self, namespace: Namespace, fills: list[Fill]) -> None:
        """Read the blocks of `fills` in the background, in order."""
        if fills:
            self._loop.spawn(self._read_all(namespace, fills))

    async def _read_all(self, namespace: Namespace, fills: list[Fill]) -> None:
        nbytes = namespace.layout.block_bytes
        step = max(1, self._hub.bounds.transfer_bytes // nbytes)
        parts = [fills[i : i + step] for i in range(0, len(fills), step)]
        started_s = self._hub.clock.monotonic_s()
        served = sum(await asyncio.gather(*(self._read(namespace, part) for part in parts)))
        if served:
            elapsed_s = self._hub.clock.monotonic_s() - started_s
            self._hub.costs[NVME].observe(1.0, float(served * nbytes), elapsed_s)

    async def _read(self, namespace: Namespace, fills: list[Fill]) -> int:
        hub = self._hub
        nbytes = namespace.layout.block_bytes
        rows = np.array([fill.row for fill in fills], dtype=np.int64)
        async with self._turns:
            requests = [
                ReadRequest(fill.key, namespace.fingerprint, nbytes, view)
                for fill, view in zip(fills, hub.writables(rows), strict=True)
            ]
            try:
                results = await self._tier.read(requests)
                self._breaker.succeeded()
            except Exception as error:
                # A tier that fails as a whole costs hits, never a request.
                log.warning("reading %d blocks from %s: %s", len(fills), self._tier.name, error)
                self._breaker.failed(hub.clock.monotonic_s())
                results = [ReadResult(None, Miss.BREAKER)] * len(fills)
            finally:
                requests.clear()
        came = [result.record is not None and result.miss is None for result in results]
        arrived = np.array(came, dtype=bool)
        sums: dict[int, int] = {}
        if hub.bounds.verify == "always":
            sums = hub.sums(rows[arrived].tolist())
        with hub.lock:
            self.queued_bytes -= len(fills) * nbytes
            hub.checksums.update(sums)
            hub.slots.free(rows[~arrived])
            self._land_locked(namespace, fills, results)
            hub.changed.notify_all()
        return int(arrived.sum())

    def _land_locked(
        self, namespace: Namespace, fills: list[Fill], results: list[ReadResult]
    ) -> None:
        hub = self._hub
        by_claim: defaultdict[tuple[int, float], list[Fill]] = defaultdict(list)
        for fill, result in zip(fills, results, strict=True):
            del self.fills[fill.key]
            fill.done = True
            if result.record is None or result.miss is not None:
                fill.miss = result.miss or Miss.ABSENT
            else:
                by_claim[(result.record.priority, result.record.expires_s)].append(fill)
        for (priority, expires_s), group in by_claim.items():
            rows = np.array([fill.row for fill in group], dtype=np.int64)
            won = hub.publish_locked(
                rows, namespace, [f.key for f in group], [f.parent for f in group], priority
            )
            if expires_s:
                hub.slots.expire_at(rows[np.array(won)], expires_s)
            for fill, mine in zip(group, won, strict=True):
                if not mine:  # a writer committed the same block meanwhile: share its copy
                    fill.row = hub.slots.index.rows_by_key[fill.key]
            waited = [fill.row for fill in group for _ in range(fill.waiters)]
            hub.slots.pin(np.array(waited, dtype=np.int64))
            hub.counters["promoted_blocks"] += len(group)

    def check_invariants_locked(self) -> None:
        """Raises InvariantError unless the bytes in flight are those of the fills."""
        nbytes = self._hub.slots.index.nbytes
        total = sum(nbytes.item(fill.row) for fill in self.fills.values())
        if total != self.queued_bytes:
            raise InvariantError(f"{self.queued_bytes} bytes in flight, but fills of {total}")

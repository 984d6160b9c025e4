"""The store in this process: RAM over NVMe, behind the verbs that every caller uses."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kvstore.answers import NVME, Explanation, NamespaceUsage, Probe, Stats
from kvstore.background import BackgroundLoop
from kvstore.below import Below
from kvstore.clock import Clock, SystemClock
from kvstore.ending import Ended, Ending
from kvstore.feed import Feed
from kvstore.hashing import Chain, Key
from kvstore.histogram import Distribution
from kvstore.hub import Bounds, Hub
from kvstore.identity import Namespace
from kvstore.lease import PENDING, Fill, Lease
from kvstore.lookup import Lookup
from kvstore.measures import Measures
from kvstore.planner import LinearCost
from kvstore.policy import Rows
from kvstore.reservation import Reservation
from kvstore.retention import DEFAULT_PRIORITY, Retained, Retention
from kvstore.store_inventory import StoreInventory
from kvstore.tier import HubTier, LocalTier, Miss, SharedArena

log = logging.getLogger(__name__)


class BlockStore:
    """Blocks in RAM, written behind to NVMe and fetched back from there.

    Every verb takes a chain, is safe from any thread, and returns without
    waiting for I/O. Only `flush` and `close` wait. After `close` every verb
    raises ClosedError. `kvstore.open` builds one from settings.
    """

    def __init__(
        self,
        ram: HubTier,
        nvme: LocalTier | None = None,
        *,
        bounds: Bounds | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Owns both tiers from here on, and closes them."""
        self._hub = Hub(ram, nvme, clock or SystemClock(), bounds or Bounds())
        self._loop = BackgroundLoop("kvstore-background")
        self._below = Below(self._hub, nvme, self._loop) if nvme is not None else None
        self._lookup = Lookup(self._hub, self._below)
        self._measures = Measures(self._hub, self._below, self._lookup)
        self._ending = Ending(self._hub, self._below, self._loop)
        self.feed = Feed([ram] if nvme is None else [ram, nvme])

    # ---- asking

    def probe(self, chain: Chain) -> Probe:
        """Where each block is. No side effect at all."""
        hub = self._hub
        with hub.lock:
            hub.check_open()
            return self._lookup.probe_locked(chain)

    def explain(
        self, chain: Chain, *, known_to: Callable[[Namespace], bool] | None = None
    ) -> Explanation:
        """Where the chain breaks, and why; no namespace is named that `known_to` says no to."""
        asked = chain.namespace
        with self._hub.lock:
            self._hub.check_open()
            answer = self._lookup.explain_locked(chain)
            namespaces = self._lookup.namespaces_locked()
        if answer.namespace_known or answer.reason != Miss.ABSENT.value:
            return answer
        known = list(filter(known_to, namespaces.values()))
        if not known:
            return answer
        nearest = min(known, key=lambda other: len(asked.differences(other)))
        return dataclasses.replace(
            answer,
            reason=Miss.IDENTITY.value,
            nearest=f"{nearest.model} ({nearest.fingerprint.hex()})",
            differences=asked.differences(nearest),
        )

    def stats(self) -> Stats:
        """Gauges and counters since `open`."""
        return self._measures.stats()

    def distributions(self) -> dict[str, Distribution]:
        """Since `open`: `promotion_s` and `demotion_s`, a block each, and how long blocks that
        made room had not been used: `ram_eviction_age_s`, `nvme_eviction_age_s`.
        """
        return self._measures.distributions()

    def usage(self) -> list[NamespaceUsage]:
        """Every namespace of which blocks were stored here, and how much of each is held."""
        return self._measures.usage()

    @property
    def load_costs(self) -> Mapping[str, LinearCost]:
        """Measured cost of reading from each lower tier, by name, for a planner."""
        return self._hub.costs

    @property
    def arena(self) -> SharedArena:
        """The memory behind all views, for a daemon to share with its clients."""
        return self._hub.ram.arena

    def memory(self) -> memoryview:
        """The arena's, populated: see `verbs.Store`."""
        arena = self._hub.ram.arena
        arena.populate(len(arena.buffer))
        return arena.buffer

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Have `wake` called whenever a block has arrived or was written; the result undoes it.

        From any thread, with the store's lock held: it may not use the store.
        """
        hub = self._hub
        with hub.lock:
            hub.listeners.add(wake)

        def unsubscribe() -> None:
            with hub.lock:
                hub.listeners.discard(wake)

        return unsubscribe

    @property
    def inventory(self) -> StoreInventory:
        """What is held, block by block, for those who run the store."""
        return StoreInventory(self._hub, self._below, self._evict)

    def queued_bytes(self) -> dict[str, int]:
        """Bytes that each lower tier has still to read for those who asked before."""
        return {} if self._below is None else {NVME: self._below.promotions.queued_bytes}

    # ---- reading

    def acquire(self, chain: Chain, *, deadline_s: float | None = None) -> Lease:
        """Pin the longest present prefix; what is on NVMe is on its way to RAM at once.

        `deadline_s` from now, what has not come is cut off the lease (default:
        `Bounds.deadline_s`). The lease may be shorter than the prefix when RAM or
        the promotion queue has no room.
        """
        hub, below = self._hub, self._below
        hub.settle_orphans()
        expires_s = hub.clock.monotonic_s()
        expires_s += hub.bounds.deadline_s if deadline_s is None else deadline_s
        with hub.lock:
            hub.check_open()
            found, rows, miss = self._lookup.identical_locked(chain)
            if len(rows) == len(chain):
                self._pin_locked(rows)
                lease = Lease(hub, chain, rows, [], expires_s, None)
            else:
                lease = self._promote_locked(chain, found, miss, expires_s)
        if below is not None:
            below.touch_used()
        if hub.bounds.verify == "always":
            self._verify(lease, found)
        return lease

    def prefetch(self, chain: Chain) -> int:
        """Start bringing the present prefix from NVMe into RAM; returns for how many blocks.

        A hint: it is refused, and counted, where RAM or the promotion queue is full.
        """
        hub, below = self._hub, self._below
        hub.settle_orphans()
        with hub.lock:
            hub.check_open()
            if below is None:
                return 0
            found = hub.slots.find(chain.keys)
            end = self._lookup.prefix_locked(chain, found)
            wanted = self._lookup.missing_locked(chain, found[:end])
            fresh = below.promotions.begin_locked(chain, wanted, found[:end])
            hub.counters["prefetch_refused_blocks"] += len(wanted) - len(fresh)
        return len(fresh)

    # ---- writing

    def reserve(self, chain: Chain, *, retention: Retention | None = None) -> Reservation:
        """Writable slots for those blocks of the chain that RAM does not hold.

        Makes room by evicting what has no better claim; where nothing can go, the
        reservation is shorter, and that is counted.
        """
        hub = self._hub
        hub.settle_orphans()
        retention = retention or Retention()
        nbytes = chain.namespace.layout.block_bytes
        with hub.lock:
            hub.check_open()
            found = hub.slots.find(chain.keys)
            wanted = self._lookup.missing_locked(chain, found)
            # A priority that the budget will not grant makes no room either.
            allowed = hub.allowed_locked(
                chain.namespace.fingerprint, retention.priority, [nbytes] * len(wanted)
            )
            rows = hub.take_slots_locked(nbytes, allowed, retention.priority, found)
            if len(rows) == allowed < len(wanted):
                others = len(wanted) - allowed
                more = hub.take_slots_locked(nbytes, others, DEFAULT_PRIORITY, found)
                rows = np.concatenate([rows, more])
            hub.counters["reserve_refused_blocks"] += len(wanted) - len(rows)
            del wanted[len(rows) :]
            return Reservation(hub, chain, wanted, rows, retention, self._committed_locked)

    def retain(self, chain: Chain, retention: Retention) -> Retained:
        """Keep these blocks as firmly as `retention` says, in every tier that holds them."""
        hub, below = self._hub, self._below
        ttl_s = min(retention.ttl_s or 0.0, hub.bounds.ttl_max_s)
        fingerprint = chain.namespace.fingerprint
        nbytes = chain.namespace.layout.block_bytes
        with hub.lock:
            hub.check_open()
            slots, now_s = hub.slots, hub.clock.wall_s()
            found = slots.find(chain.keys)
            there = [False] * len(chain) if below is None else below.holds_locked(chain.keys)
            held = [i for i, row in enumerate(found) if row is not None or there[i]]
            slots.expire(now_s)
            sizes = [0 if self._stands_above_locked(found[i]) else nbytes for i in held]
            allowed = hub.allowed_locked(fingerprint, retention.priority, sizes)
            rows = [row for i in held[:allowed] if (row := found[i]) is not None]
            slots.retain(np.array(rows, dtype=np.int64), retention.priority, ttl_s, now_s)
            if below is not None:
                lower = [chain.keys[i] for i in held[:allowed] if there[i]]
                expires_s = now_s + ttl_s if ttl_s else 0.0
                below.errands.retain_locked(lower, retention.priority, expires_s)
        clipped = allowed if ttl_s < (retention.ttl_s or 0.0) else 0
        refused, absent = len(held) - allowed, len(chain) - len(held)
        granted = (retention.priority, ttl_s or None)
        return Retained(allowed - clipped, clipped, refused, absent, *granted)

    def evict(self, chain: Chain) -> int:
        """Drop blocks from every tier; returns how many were held and are no longer found.

        A block that a lease has pinned stays in RAM until it is evicted otherwise.
        One that is on its way from NVMe is a miss for those who wait for it.
        """
        return self._evict(chain.keys)

    def _evict(self, asked: Sequence[Key]) -> int:
        hub, below = self._hub, self._below
        hub.settle_orphans()
        keys = list(dict.fromkeys(asked))
        with hub.lock:
            hub.check_open()
            held = {key for key in keys if key in hub.slots.index.rows_by_key}
            self._drop_locked(keys)
            if below is not None:
                fills = below.promotions.fills
                for fill in [fills[key] for key in keys if key in fills]:
                    below.promotions.drop_locked(fill, Miss.EVICTED)
                lower = [
                    key for key, there in zip(keys, below.holds_locked(keys), strict=True) if there
                ]
                below.errands.delete_locked(lower)
                held.update(lower)
                hub.notify_locked()
            return len(held.difference(hub.slots.index.rows_by_key))

    # ---- ending

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until NVMe has all that RAM holds, as far as it takes it; False on timeout."""
        with self._hub.lock:
            self._hub.check_open()
        return self._ending.flush(timeout_s)

    def close(self, timeout_s: float | None = None) -> None:
        """Write behind all that was committed, then give everything back. May be called twice.

        What is not written after `timeout_s` is dropped. A tier that does not answer is
        not waited for: what it holds is given back when it does, if ever.
        """
        hub = self._hub
        hub.settle_orphans()
        with hub.lock:
            if hub.closed:
                return
            hub.closed = True
            self.feed.close()
        self._ending.close(timeout_s)

    @property
    def ended(self) -> Ended | None:
        """What `close` wrote and dropped; None before."""
        return self._ending.ended

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def check_invariants(self) -> None:
        """Raises InvariantError where the store's own state contradicts itself."""
        hub = self._hub
        with hub.lock:
            hub.slots.check_invariants()
            if self._below is not None:
                self._below.promotions.check_invariants_locked()
                self._below.demotions.check_invariants_locked()

    # ---- inside

    def _promote_locked(
        self, chain: Chain, found: list[int | None], miss: Miss | None, expires_s: float
    ) -> Lease:
        """A lease over what is in RAM, what is on its way, and what is fetched for it."""
        hub, below = self._hub, self._below
        end = self._lookup.prefix_locked(chain, found)
        if end < len(found):
            miss = self._lookup.why_absent_locked(chain.keys[end])
        fills: dict[Key, Fill] = {}
        if below is not None:
            fills = below.promotions.fills
            wanted = self._lookup.missing_locked(chain, found[:end])
            fresh = below.promotions.begin_locked(chain, wanted, found[:end])
            if len(fresh) < len(wanted):
                # No room in RAM or in the queue: serve what fits, rather than wait.
                end, miss = wanted[len(fresh)], Miss.TOO_SLOW
                hub.counters["acquires_shortened"] += 1
        pending = [(i, fills[chain.keys[i]]) for i in range(end) if found[i] is None]
        ours = chain.namespace.fingerprint
        stranger = next((i for i, fill in pending if fill.namespace != ours), end)
        if stranger < end:
            end, miss = stranger, Miss.IDENTITY
            pending = [(i, fill) for i, fill in pending if i < end]
        if below is not None:
            hub.counters["coalesced_blocks"] += len(pending) - len(fresh)
        rows = np.array([PENDING if row is None else row for row in found[:end]], dtype=np.int64)
        self._pin_locked(rows[rows != PENDING])
        return Lease(hub, chain, rows, pending, expires_s, miss)

    def _pin_locked(self, rows: Rows) -> None:
        self._hub.slots.pin(rows)
        self._hub.slots.touch(rows)
        self._hub.mark_used_locked(rows)

    def _verify(self, lease: Lease, found: list[int | None]) -> None:
        """Cut the lease at the first RAM block whose bytes are not those committed."""
        hub = self._hub
        rows = {row: i for i, row in enumerate(found[: len(lease)]) if row is not None}
        damaged = hub.damaged_among(rows)
        if not damaged:
            return
        position = min(rows[row] for row in damaged)
        with hub.lock:
            lease.cut_locked(position, Miss.CHECKSUM)
            keys = [key for row in damaged if (key := hub.slots.index.keys[row]) is not None]
            for key in keys:
                hub.remember_damaged_locked(key)
            self._drop_locked(keys)

    def _drop_locked(self, keys: list[Key]) -> None:
        """Evict from RAM those of these blocks that no lease holds. Keys are distinct."""
        hub, below = self._hub, self._below
        rows = [row for row in hub.slots.find(keys) if row is not None]
        if below is not None:
            below.demotions.withdraw_locked(rows)
        loose = np.array(rows, dtype=np.int64)
        loose = loose[hub.slots.index.pins[loose] == 0]
        hub.slots.evict(loose)
        if below is not None:  # what is being written is given back when it is written
            loose = loose[[not below.demotions.is_writing_locked(row) for row in loose.tolist()]]
        hub.slots.free(loose)

    def _stands_above_locked(self, row: int | None) -> bool:
        return row is not None and bool(self._hub.slots.index.priority[row] > DEFAULT_PRIORITY)

    def _committed_locked(self, rows: list[int]) -> None:
        if self._below is not None:
            self._below.demotions.offer_locked(rows)

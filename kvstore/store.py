"""The store in this process: RAM over NVMe, behind the verbs that every caller uses."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import numpy as np

from kvstore.answers import NVME, RAM, Explanation, Probe, Stats
from kvstore.background import BackgroundLoop
from kvstore.below import Below
from kvstore.clock import Clock, SystemClock
from kvstore.hashing import Chain, Key
from kvstore.hub import Bounds, Hub
from kvstore.identity import Namespace
from kvstore.lease import PENDING, Fill, Lease
from kvstore.planner import LinearCost
from kvstore.reservation import Reservation
from kvstore.retention import DEFAULT_PRIORITY, Retained, Retention, within_budget
from kvstore.tier import HubTier, LocalTier, Miss


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
        self._hub = Hub(ram, clock or SystemClock(), bounds or Bounds())
        self._loop = BackgroundLoop("kvstore-background")
        self._below = Below(self._hub, nvme, self._loop) if nvme is not None else None

    # ---- asking

    def probe(self, chain: Chain) -> Probe:
        """Where each block is. No side effect at all."""
        hub = self._hub
        with hub.lock:
            hub.check_open_locked()
            rows = hub.slots.find(chain.keys)
            if None not in rows:
                return Probe([RAM] * len(rows))
            below = self._peek_locked(chain)
        return Probe(
            [
                RAM if row is not None else NVME if lower else None
                for row, lower in zip(rows, below, strict=True)
            ]
        )

    def explain(self, chain: Chain) -> Explanation:
        """Where the chain breaks, and why."""
        tiers = self.probe(chain)
        present = len(chain) - tiers.tiers.count(None)
        asked = chain.namespace
        with self._hub.lock:
            known: dict[bytes, Namespace] = dict(self._hub.namespaces)
            if self._below is not None:
                known.update(self._below.namespaces())
            is_known = asked.fingerprint in known
            if tiers.prefix == len(chain):
                return Explanation(len(chain), present, None, None, is_known)
            reason = self._why_absent_locked(chain.keys[tiers.prefix])
        if is_known or not known or reason is not Miss.ABSENT:
            return Explanation(len(chain), present, tiers.prefix, reason.value, is_known)
        nearest = min(known.values(), key=lambda other: len(asked.differences(other)))
        return Explanation(
            len(chain),
            present,
            tiers.prefix,
            Miss.IDENTITY.value,
            is_known,
            f"{nearest.model} ({nearest.fingerprint.hex()})",
            asked.differences(nearest),
        )

    def stats(self) -> Stats:
        """Gauges and counters since `open`."""
        hub = self._hub
        nvme = {} if self._below is None else dict(self._below.tier.stats())
        with hub.lock:
            space = hub.slots.space
            ram = {
                "blocks": len(hub.slots),
                "used_bytes": space.used_bytes,
                "capacity_bytes": space.capacity_bytes,
                "evicted_blocks": hub.slots.evicted_blocks,
                "pinned_blocks": int((hub.slots.index.pins > 0).sum()),
            }
            return Stats(ram, nvme, dict(hub.hits), dict(hub.misses), dict(hub.counters))

    @property
    def load_costs(self) -> Mapping[str, LinearCost]:
        """Measured cost of reading from each lower tier, by name, for a planner."""
        return self._hub.costs

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
        fresh: list[Fill] = []
        with hub.lock:
            hub.check_open_locked()
            found, miss = self._identical_locked(chain)
            rows = [row for row in found if row is not None]
            if len(rows) == len(chain):
                self._pin_locked(rows)
                lease = Lease(hub, chain, rows, [], expires_s, None)
            else:
                lease, fresh = self._promote_locked(chain, found, miss, expires_s)
        if below is not None:
            below.promotions.start(chain.namespace, fresh)
            below.touch_used()
        if hub.bounds.verify == "always":
            self._verify(lease, found)
        return lease

    def prefetch(self, chain: Chain) -> int:
        """Start bringing what is on NVMe into RAM; returns for how many blocks.

        A hint: it is refused, and counted, where the promotion queue is full.
        """
        hub, below = self._hub, self._below
        hub.settle_orphans()
        with hub.lock:
            hub.check_open_locked()
            if below is None:
                return 0
            found = hub.slots.find(chain.keys)
            there = below.peek_locked(chain.keys)
            fills = below.promotions.fills
            wanted = [
                i
                for i, key in enumerate(chain.keys)
                if found[i] is None and there[i] and key not in fills
            ]
            fresh = below.promotions.begin_locked(chain, wanted)
            hub.counters["prefetch_refused_blocks"] += len(wanted) - len(fresh)
        below.promotions.start(chain.namespace, fresh)
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
        fills = {} if self._below is None else self._below.promotions.fills
        with hub.lock:
            hub.check_open_locked()
            found = hub.slots.find(chain.keys)
            wanted = [
                i for i, row in enumerate(found) if row is None and chain.keys[i] not in fills
            ]
            rows = hub.take_slots_locked(nbytes, len(wanted), retention.priority)
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
            hub.check_open_locked()
            slots = hub.slots
            found = slots.find(chain.keys)
            there = self._peek_locked(chain)
            held = [i for i, row in enumerate(found) if row is not None or there[i]]
            protected = slots.protected_bytes[slots.namespace_id(fingerprint)]
            if below is not None:
                protected = max(protected, below.tier.protected_bytes(fingerprint))
            sizes = [0 if self._stands_above_locked(found[i]) else nbytes for i in held]
            allowed = within_budget(
                retention.priority, sizes, protected, hub.bounds.protected_bytes
            )
            rows = [row for i in held[:allowed] if (row := found[i]) is not None]
            now_s = hub.clock.wall_s()
            slots.retain(np.array(rows, dtype=np.int64), retention.priority, ttl_s, now_s)
        if below is not None:
            lower = [chain.keys[i] for i in held[:allowed] if there[i]]
            below.retain(lower, retention.priority, now_s + ttl_s if ttl_s else 0.0)
        clipped = allowed if ttl_s < (retention.ttl_s or 0.0) else 0
        return Retained(allowed - clipped, clipped, len(held) - allowed, len(chain) - len(held))

    def evict(self, chain: Chain) -> int:
        """Drop blocks from every tier; returns how many were held and are no longer found.

        A block that a lease has pinned stays in RAM until it is evicted otherwise.
        """
        hub, below = self._hub, self._below
        hub.settle_orphans()
        with hub.lock:
            hub.check_open_locked()
            found = [row for row in hub.slots.find(chain.keys) if row is not None]
            lower: list[Key] = []
            if below is not None:
                below.demotions.withdraw_locked(found)
                there = below.peek_locked(chain.keys)
                lower = [key for key, held in zip(chain.keys, there, strict=True) if held]
                below.delete_locked(lower)
            rows = np.array(found, dtype=np.int64)
            rows = rows[hub.slots.index.pins[rows] == 0]
            gone = {hub.slots.index.keys[row] for row in rows.tolist()}
            hub.slots.evict(rows)
            hub.slots.free(rows)
        return len(gone.union(lower))

    # ---- ending

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until NVMe has all that RAM holds, as far as it takes it; False on timeout."""
        hub, below = self._hub, self._below
        if below is None:
            return True
        until_s = None if timeout_s is None else hub.clock.monotonic_s() + timeout_s
        with hub.lock:
            keys = list(hub.slots.index.rows_by_key)
            safe = below.tier.peek(keys)
            waiting = [key for key, there in zip(keys, safe, strict=True) if not there]
            while True:
                batch = waiting[: below.demotions.room_locked()]
                del waiting[: len(batch)]
                rows = hub.slots.find(batch)
                below.demotions.offer_locked([row for row in rows if row is not None])
                if not waiting and below.demotions.idle:
                    return True
                left_s = None if until_s is None else until_s - hub.clock.monotonic_s()
                if left_s is not None and left_s <= 0:
                    return False
                hub.changed.wait(left_s)

    def close(self) -> None:
        """Write behind all that was committed, then give everything back. May be called twice."""
        hub, below = self._hub, self._below
        hub.settle_orphans()
        with hub.lock:
            if hub.closed:
                return
            hub.closed = True
        with contextlib.ExitStack() as ending:
            ending.callback(self._loop.stop)
            ending.callback(lambda: self._loop.spawn(hub.ram.close()).result())
            ending.callback(hub.release_views)
            if below is not None:
                tier = below.tier
                ending.callback(lambda: self._loop.spawn(tier.close()).result())
                self.flush()
                with hub.lock:
                    while below.promotions.fills:
                        hub.changed.wait()

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

    # ---- inside

    def _peek_locked(self, chain: Chain) -> list[bool]:
        """Which blocks the lower tier would serve now."""
        if self._below is None:
            return [False] * len(chain)
        return self._below.peek_locked(chain.keys)

    def _identical_locked(self, chain: Chain) -> tuple[list[int | None], Miss | None]:
        """Rows of the chain's resident blocks; up to the first that is not what it is asked as.

        Keys hash the namespace, so this bites only when a caller mixes up its
        chains; what it protects is worth the few microseconds.
        """
        slots = self._hub.slots
        found = slots.find(chain.keys)
        held = [i for i, row in enumerate(found) if row is not None]
        rows = np.array([found[i] for i in held], dtype=np.int64)
        same = slots.index.namespace[rows] == slots.namespace_id(chain.namespace.fingerprint)
        same &= slots.index.nbytes[rows] == chain.namespace.layout.block_bytes
        if same.all():
            return found, None
        return found[: held[int(np.argmin(same))]], Miss.IDENTITY

    def _promote_locked(
        self, chain: Chain, found: list[int | None], miss: Miss | None, expires_s: float
    ) -> tuple[Lease, list[Fill]]:
        """A lease over rows and fills, and those of the fills that are to be started."""
        hub, below = self._hub, self._below
        fills = {} if below is None else below.promotions.fills
        there = self._peek_locked(chain)
        end = 0
        while end < len(found) and (
            found[end] is not None or there[end] or chain.keys[end] in fills
        ):
            end += 1
        if end < len(found):
            miss = self._why_absent_locked(chain.keys[end])
        self._pin_locked([row for row in found[:end] if row is not None])
        wanted = [i for i in range(end) if found[i] is None and chain.keys[i] not in fills]
        fresh = [] if below is None else below.promotions.begin_locked(chain, wanted)
        if len(fresh) < len(wanted):
            # No room in RAM or in the queue: serve what fits, rather than wait.
            shorter = wanted[len(fresh)]
            surplus = [row for row in found[shorter:end] if row is not None]
            hub.slots.unpin(np.array(surplus, dtype=np.int64), hub.clock.wall_s())
            end, miss = shorter, Miss.TOO_SLOW
            hub.counters["acquires_shortened"] += 1
        pending = [(i, fills[chain.keys[i]]) for i in range(end) if found[i] is None]
        hub.counters["coalesced_blocks"] += len(pending) - len(fresh)
        rows = [PENDING if row is None else row for row in found[:end]]
        return Lease(hub, chain, rows, pending, expires_s, miss), fresh

    def _why_absent_locked(self, key: Key) -> Miss:
        if self._hub.slots.was_evicted(key):
            return Miss.EVICTED
        return Miss.ABSENT if self._below is None else self._below.why_absent(key)

    def _pin_locked(self, rows: list[int]) -> None:
        array = np.array(rows, dtype=np.int64)
        self._hub.slots.pin(array)
        self._hub.slots.touch(array)

    def _verify(self, lease: Lease, found: list[int | None]) -> None:
        """Cut the lease at the first RAM block whose bytes are not those committed."""
        hub = self._hub
        rows = [PENDING if row is None else row for row in found[: len(lease)]]
        sums = hub.sums([row for row in rows if row != PENDING])
        with hub.lock:
            for position, row in enumerate(rows):
                if row == PENDING or sums[row] == hub.checksums.get(row):
                    continue
                lease.cut_locked(position, Miss.CHECKSUM)
                if not hub.slots.index.pins[row]:
                    bad = np.array([row], dtype=np.int64)
                    hub.slots.evict(bad)
                    hub.slots.free(bad)
                return

    def _stands_above_locked(self, row: int | None) -> bool:
        return row is not None and bool(self._hub.slots.index.priority[row] > DEFAULT_PRIORITY)

    def _committed_locked(self, rows: list[int]) -> None:
        if self._below is not None:
            self._below.demotions.offer_locked(rows)

"""RAM, the tier at one end of every transfer: its slots, its lock, and who waits for what."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvstore.answers import NVME
from kvstore.clock import Clock
from kvstore.errors import ClosedError
from kvstore.frame import checksum
from kvstore.hashing import Key
from kvstore.histogram import AGE_BOUNDS_S, LATENCY_BOUNDS_S, Histogram
from kvstore.identity import Namespace
from kvstore.planner import LinearCost
from kvstore.policy import Rows
from kvstore.retention import DEFAULT_PRIORITY, within_budget
from kvstore.slots import Batch
from kvstore.tier import HubTier, LocalTier

MiB = 1 << 20

DAMAGED_REMEMBERED = 65_536  # keys of which `explain` can say that their checksum was wrong
NAMESPACES_REMEMBERED = 16_384  # or twice as many as have blocks in RAM
USED_REMEMBERED = 4096  # leases; more are only released at once where as many were held


@dataclass(frozen=True, slots=True)
class Bounds:
    """Every limit of the store, and what happens at it."""

    demotion_queue_blocks: int = 4096  # beyond: the block stays in RAM only, until close
    promotion_queue_bytes: int = 1024 * MiB  # beyond: an acquire is shortened, a prefetch refused
    transfer_bytes: int = 64 * MiB  # one read or write of a tier; larger ones are cut up
    transfers_in_flight: int = 3  # reads of a tier at once, and writes; more wait their turn
    transfer_deadline_s: float = 10.0  # of one; beyond: the tier is left alone until it answers
    deadline_s: float = 5.0  # of an acquire that names none; beyond: a counted miss
    protected_bytes: int = 256 * MiB  # above default priority, per namespace; beyond: refused
    ttl_max_s: float = 7 * 86_400.0  # of a retention that has a TTL; beyond: clipped
    verify: Literal["media", "always"] = "media"  # checksum bytes that never left RAM, or not


class Hub:
    """State that the verbs share. Names ending in `_locked` want `lock` held."""

    def __init__(self, ram: HubTier, lower: LocalTier | None, clock: Clock, bounds: Bounds) -> None:
        self.ram = ram
        self.lower = lower
        self.slots = ram.slots
        self.lock = ram.lock
        self.changed = threading.Condition(ram.lock)
        self.listeners: set[Callable[[], None]] = set()  # as `changed`, for event loops
        self.clock = clock
        self.bounds = bounds
        self.closed = False
        self.counters: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.costs = {NVME: LinearCost()}
        # A block each: from asked for to in RAM, from committed to safe below, and how long
        # unused when it had to make room.
        self.promotion_s = Histogram(LATENCY_BOUNDS_S)
        self.demotion_s = Histogram(LATENCY_BOUNDS_S)
        self.eviction_age_s = Histogram(AGE_BOUNDS_S)
        self.namespaces: dict[bytes, Namespace] = {}  # of what is here, and was lately
        self._most_namespaces = NAMESPACES_REMEMBERED
        # Keys of released leases, for the recency of the lower tier.
        self.used: deque[Sequence[Key]] = deque(maxlen=0 if lower is None else USED_REMEMBERED)
        self.damaged: set[Key] = set()  # last seen with a wrong checksum
        self.checksums: dict[int, int] = {}  # row -> checksum, where `verify` is "always"
        self._readable = ram.buffer.toreadonly()
        # A lease that its owner lost is found by the garbage collector, which may run while
        # this very thread holds the lock; so it only leaves word here, for the next verb.
        self.orphans: deque[Callable[[], None]] = deque()

    def check_open(self) -> None:
        """Raises ClosedError; without the lock, the store may close right after."""
        if self.closed:
            raise ClosedError("the store is closed; open another one")

    def notify_locked(self) -> None:
        """A fill has ended, or something has been written or deleted below."""
        self.changed.notify_all()
        for wake in self.listeners:
            wake()

    def settle_orphans(self) -> None:
        """Release what lost owners held. Lock not held."""
        while self.orphans:
            try:
                release = self.orphans.popleft()
            except IndexError:  # another thread took the last one
                return
            release()

    def take_slots_locked(
        self, nbytes: int, count: int, priority: int, keep: Sequence[int | None]
    ) -> Rows:
        """Up to `count` reserved rows, made room for by evicting what has no better claim.

        Nor any of the rows `keep`: the ancestors of what is to come.
        """
        slots = self.slots
        rows = slots.reserve(nbytes, count)
        while len(rows) < count:
            missing, now_s = count - len(rows), self.clock.wall_s()
            victims = slots.victims(nbytes, missing, priority, now_s, set(keep))
            if not len(victims):
                break
            self.eviction_age_s.add_all(self.clock.monotonic_s() - slots.index.used_s[victims])
            slots.free(victims)
            rows = np.concatenate([rows, slots.reserve(nbytes, missing)])
        return rows

    def allowed_locked(self, fingerprint: bytes, priority: int, wanted_bytes: list[int]) -> int:
        """How many leading blocks of these sizes the namespace's budget lets have `priority`."""
        if priority <= DEFAULT_PRIORITY:
            return len(wanted_bytes)
        slots = self.slots
        slots.expire(self.clock.wall_s())
        protected = slots.protected_bytes[slots.namespace_id(fingerprint)]
        if self.lower is not None:
            protected = max(protected, self.lower.protected_bytes(fingerprint))
        return within_budget(priority, wanted_bytes, protected, self.bounds.protected_bytes)

    def publish_locked(
        self,
        rows: Rows,
        namespace: Namespace,
        keys: Sequence[Key],
        parents: Sequence[Key],
        priority: int = DEFAULT_PRIORITY,
        ttl_s: float = 0.0,
    ) -> list[bool]:
        """Commit filled rows; True for those that now are the resident copy of their key."""
        fingerprint = namespace.fingerprint
        if fingerprint not in self.namespaces:
            self._forget_namespaces_locked()
            self.namespaces[fingerprint] = namespace
        if self.damaged:
            self.damaged.difference_update(keys)
        self.mark_used_locked(rows)
        return self.slots.commit(rows, Batch(fingerprint, keys, parents, priority, ttl_s))

    def _forget_namespaces_locked(self) -> None:
        """Those without a block here, where there are many: some engines have one a user."""
        if len(self.namespaces) >= self._most_namespaces:
            held = self.slots.usage()
            self.namespaces = {name: each for name, each in self.namespaces.items() if name in held}
            self._most_namespaces = max(NAMESPACES_REMEMBERED, 2 * len(self.namespaces))

    def mark_used_locked(self, rows: Rows) -> None:
        """These rows are in use now; their age at eviction is counted from here."""
        self.slots.index.used_s[rows] = self.clock.monotonic_s()

    def sums(self, rows: Collection[int]) -> dict[int, int]:
        """Checksums of rows that nobody else can change (reserved, or pinned)."""
        return {row: checksum(self.readable(row)) for row in rows}

    def damaged_among(self, rows: Collection[int]) -> set[int]:
        """Pinned rows whose bytes are not those committed; none where that is not asked for."""
        if self.bounds.verify != "always":
            return set()
        sums = self.sums(rows)
        return {row for row in rows if sums[row] != self.checksums.get(row)}

    def remember_damaged_locked(self, key: Key) -> None:
        if len(self.damaged) >= DAMAGED_REMEMBERED:
            self.damaged.clear()
        self.damaged.add(key)

    def release_views(self) -> None:
        """Let go of the arena, so that it can be unmapped."""
        self._readable.release()

    def readable(self, row: int) -> memoryview:
        """Read-only view of a row's block."""
        start = self.slots.index.offset.item(row)
        return self._readable[start : start + self.slots.index.nbytes.item(row)]

    def readables(self, rows: Rows) -> list[memoryview]:
        """Read-only views of many rows' blocks, in a batch."""
        buffer = self._readable
        starts = self.slots.index.offset[rows]
        stops = starts + self.slots.index.nbytes[rows]
        return [buffer[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]

    def writables(self, rows: Rows) -> list[memoryview]:
        """Writable views of many rows' blocks, in a batch."""
        buffer = self.ram.buffer
        starts = self.slots.index.offset[rows]
        stops = starts + self.slots.index.nbytes[rows]
        self.ram.populate(int(stops.max(initial=0)))
        return [buffer[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]

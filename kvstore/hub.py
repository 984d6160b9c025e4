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
from kvstore.frame import checksum
from kvstore.errors import ClosedError
from kvstore.hashing import Key
from kvstore.identity import Namespace
from kvstore.planner import LinearCost
from kvstore.policy import Rows
from kvstore.retention import DEFAULT_PRIORITY
from kvstore.slots import Batch
from kvstore.tier import HubTier

MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class Bounds:
    """Every limit of the store, and what happens at it."""

    demotion_queue_blocks: int = 4096  # beyond: the block stays in RAM only, until close
    promotion_queue_bytes: int = 1024 * MiB  # beyond: an acquire is shortened, a prefetch refused
    transfer_bytes: int = 16 * MiB  # one read or write of a tier; larger ones are cut up
    transfers_in_flight: int = 2  # reads of a tier at once, and writes; more wait their turn
    deadline_s: float = 5.0  # of an acquire that names none; beyond: a counted miss
    protected_bytes: int = 256 * MiB  # above default priority, per namespace; beyond: refused
    ttl_max_s: float = 7 * 86_400.0  # of a retention; beyond: clipped
    verify: Literal["media", "always"] = "media"  # checksum bytes that never left RAM, or not


class Hub:
    """State that the verbs share. Names ending in `_locked` want `lock` held.

    `changed` is notified whenever a fill ends or a demotion is done.
    """

    def __init__(self, ram: HubTier, clock: Clock, bounds: Bounds) -> None:
        self.ram = ram
        self.slots = ram.slots
        self.lock = ram.lock
        self.changed = threading.Condition(ram.lock)
        self.clock = clock
        self.bounds = bounds
        self.closed = False
        self.counters: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()
        self.costs = {NVME: LinearCost()}
        self.namespaces: dict[bytes, Namespace] = {}  # of what was committed here
        self.used: deque[Sequence[Key]] = deque(maxlen=4096)  # for the lower tier's recency
        self.checksums: dict[int, int] = {}  # row -> checksum, where `verify` is "always"
        self._readable = ram.buffer.toreadonly()
        # A lease that its owner lost is found by the garbage collector, which may run while
        # this very thread holds the lock; so it only leaves word here, for the next verb.
        self.orphans: deque[Callable[[], None]] = deque()

    def check_open_locked(self) -> None:
        if self.closed:
            raise ClosedError("the store is closed; open another one")

    def settle_orphans(self) -> None:
        """Release what lost owners held. Lock not held."""
        while self.orphans:
            self.orphans.popleft()()

    def take_slots_locked(self, nbytes: int, count: int, priority: int) -> Rows:
        """Up to `count` reserved rows, made room for by evicting what has no better claim."""
        slots = self.slots
        rows = slots.reserve(nbytes, count)
        while len(rows) < count:
            victims = slots.victims(nbytes, count - len(rows), priority, self.clock.wall_s())
            if not len(victims):
                break
            slots.free(victims)
            rows = np.concatenate([rows, slots.reserve(nbytes, count - len(rows))])
        return rows

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
        self.namespaces.setdefault(fingerprint, namespace)
        return self.slots.commit(rows, Batch(fingerprint, keys, parents, priority, ttl_s))

    def sums(self, rows: Collection[int]) -> dict[int, int]:
        """Checksums of rows that nobody else can change (reserved, or pinned)."""
        return {row: checksum(self.readable(row)) for row in rows}

    def release_views(self) -> None:
        """Let go of the arena, so that it can be unmapped."""
        self._readable.release()

    def readable(self, row: int) -> memoryview:
        """Read-only view of a row's block."""
        start = self.slots.index.offset.item(row)
        return self._readable[start : start + self.slots.index.nbytes.item(row)]

    def readables(self, rows: Sequence[int]) -> list[memoryview]:
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
        return [buffer[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]

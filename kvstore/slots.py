"""The bookkeeping of a local tier: which block lies where, and who must go next.

RAM arena and NVMe slab are the same problem: extents of one space, rows of one
table, an order of eviction. `SlotTable` is that problem without the bytes.
Always, under every policy: the lowest priority goes first, a chain's deepest
block before its ancestors, and never a pinned block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import compress, pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.allocator import ExtentAllocator, align_up
from kvstore.errors import IllegalMoveError, InvariantError
from kvstore.eviction import EvictionOrder
from kvstore.expiry import Expiry
from kvstore.hashing import Key
from kvstore.index import Index, State
from kvstore.policy import EvictionPolicy, Lru, Rows
from kvstore.retention import DEFAULT_PRIORITY, MAX_PRIORITY

EVICTED_REMEMBERED = 65_536  # keys at least; so that a miss can say "evicted", not "absent"


class Batch(NamedTuple):
    """Blocks of one namespace that become resident together; one item a block."""

    namespace: bytes
    keys: Sequence[Key]
    parents: Sequence[Key]
    priority: int = DEFAULT_PRIORITY
    ttl_s: float = 0.0  # 0: the priority never falls back


class Usage(NamedTuple):
    """What a namespace holds in one tier."""

    blocks: int
    nbytes: int


class StoredBlocks(NamedTuple):
    """Blocks that survived a restart, as columns; least recently used first."""

    keys: list[Key]
    parents: list[Key]
    namespaces: list[bytes]
    offsets: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    priorities: NDArray[np.uint8]
    expires_s: NDArray[np.float64]


class Listener(Protocol):
    """Told what becomes visible and invisible, as it does. Called under the owner's lock.

    The sequences are not changed any more; keep them if you like.
    """

    def stored(self, namespace: bytes, keys: Sequence[Key], parents: Sequence[Key]) -> None: ...

    def removed(self, namespace: bytes, keys: Sequence[Key]) -> None: ...


class SlotTable:
    """Extents, rows and eviction order of one tier. Not thread-safe: the owner locks.

    Rows are int64 arrays, valid until freed. No method does I/O or reads a clock.
    A move that is not legal raises IllegalMoveError and changes nothing.
    """

    def __init__(self, capacity_bytes: int, policy: EvictionPolicy | None = None) -> None:
        self.index = Index()
        self.space = ExtentAllocator(capacity_bytes)
        self.policy: EvictionPolicy = policy or Lru()
        self.listener: Listener | None = None
        self.evicted_blocks = 0
        self.protected_bytes: Counter[int] = Counter()  # namespace id -> above default priority
        self._namespace_ids: dict[bytes, int] = {}
        self._namespaces: list[bytes] = []
        self._held: NDArray[np.int64] = np.zeros((2, 16), dtype=np.int64)  # blocks, bytes: by id
        self._order = EvictionOrder(self.index)
        self._expiry = Expiry(self.index)
        self._evicted: set[Key] = set()
        self._evicted_before: set[Key] = set()  # what `_evicted` was when it was full

    # ---- finding

    def __len__(self) -> int:
        return len(self.index)

    def find(self, keys: Sequence[Key]) -> list[int | None]:
        """Row of each resident block. No side effect."""
        return self.index.find(keys)

    def was_evicted(self, key: Key) -> bool:
        """Whether the block was here, was evicted, and has not come back.

        At least the last `EVICTED_REMEMBERED` are remembered, at most twice as many.
        """
        gone = key in self._evicted or key in self._evicted_before
        return gone and key not in self.index.rows_by_key

    def namespace_id(self, fingerprint: bytes) -> int:
        """The number that stands for a namespace in the `namespace` column; -1 if not seen yet."""
        return self._namespace_ids.get(fingerprint, -1)

    def namespace(self, row: int) -> bytes:
        """Fingerprint of the namespace of a resident row."""
        return self._namespaces[self.index.namespace.item(row)]

    def usage(self) -> dict[bytes, Usage]:
        """What each namespace holds."""
        held = zip(self._namespaces, *self._held.tolist(), strict=False)
        return {name: Usage(blocks, nbytes) for name, blocks, nbytes in held if blocks}

    def fingerprints(self) -> list[bytes]:
        """Of the namespaces seen, by the number that stands for each in the `namespace` column."""
        return self._namespaces.copy()

    # ---- the life of a block

    def reserve(self, nbytes: int, count: int) -> Rows:
        """Up to `count` rows with an extent of `nbytes` each, from free space only."""
        offsets = self.space.allocate(nbytes, count)
        rows = self.index.take(len(offsets))
        self.index.offset[rows] = offsets
        self.index.nbytes[rows] = nbytes
        return rows

    def commit(self, rows: Rows, batch: Batch) -> list[bool]:
        """RESERVED -> RESIDENT. False where the key was resident already: that row is freed.

        `rows[i]` is the block `batch.keys[i]`. The first commit of a key wins.
        """
        self.index.check_move(rows, State.RESIDENT)
        _check_priority(batch.priority)
        if not len(rows) == len(batch.keys) == len(batch.parents):
            raise IllegalMoveError(f"{len(rows)} rows for {len(batch.keys)} keys")
        first = self.index.rows_by_key.setdefault
        won = [first(key, row) == row for row, key in zip(rows.tolist(), batch.keys, strict=True)]
        if all(won):
            self._admit(rows, batch)
            return won
        mask = np.array(won)
        self.free(rows[~mask])
        keys, parents = list(compress(batch.keys, won)), list(compress(batch.parents, won))
        self._admit(rows[mask], batch._replace(keys=keys, parents=parents))
        return won

    def free(self, rows: Rows) -> None:
        """RESERVED or EVICTING -> FREE: the extents may be given out again."""
        self.index.give_back(rows)
        self.space.free(self.index.offset[rows], self.index.nbytes[rows])

    def pin(self, rows: Rows) -> None:
        """A pinned block is not evicted. Pins count; a row may stand in `rows` twice."""
        self.index.check_resident(rows)
        self._add_pins(rows, 1)

    def unpin(self, rows: Rows, now_s: float) -> None:
        """Undo one `pin` a row; the clock of a retention starts when the last is undone."""
        index = self.index
        self._add_pins(rows, -1)
        pins = index.pins[rows]
        if (pins < 0).any():
            self._add_pins(rows, 1)
            raise IllegalMoveError("a row was unpinned more often than pinned")
        loose = rows[pins == 0]
        self._order.unpinned(loose)
        for row in loose[(index.ttl_s[loose] > 0) | (index.expires_s[loose] > 0)].tolist():
            ttl_s = index.ttl_s.item(row)
            self._expiry.set(row, now_s + ttl_s if ttl_s else index.expires_s.item(row))

    def touch(self, rows: Rows) -> None:
        """These blocks were used again."""
        self.index.rank[rows] = self.policy.touched(rows, self.index.rank[rows])

    def evict(self, rows: Rows) -> None:
        """RESIDENT -> EVICTING: no longer found. The caller calls `free` when it may."""
        self.index.move(rows, State.EVICTING)
        listed: list[int] = rows.tolist()
        self._forget(rows, listed)
        self._order.remove(listed)

    def victims(
        self,
        nbytes: int,
        count: int,
        priority: int,
        now_s: float,
        keep: Collection[int | None] = (),
    ) -> Rows:
        """Evict blocks with no better claim than `priority` until their extents add up.

        Makes for `count` extents of `nbytes` more than are free now. The rows come
        back EVICTING; after `free(rows)` a `reserve` may still get fewer than
        `count` when the free space is in pieces: ask again with what is missing.
        `keep` are rows that must stay. A block that can never fit evicts nothing.
        """
        self.expire(now_s)
        size = align_up(nbytes)
        fits = size <= self.space.capacity_bytes
        chosen = self._order.choose(count * size, priority, keep) if fits else []
        rows = np.array(chosen, dtype=np.int64)
        self.index.move(rows, State.EVICTING)
        self._forget(rows, chosen)
        return rows

    # ---- retention

    def retain(self, rows: Rows, priority: int, ttl_s: float, now_s: float) -> None:
        """Set priority and TTL (0: never falls back) of resident rows."""
        self.index.check_resident(rows)
        _check_priority(priority)
        self.index.ttl_s[rows] = ttl_s
        for row in rows.tolist():
            pinned = self.index.pins.item(row)
            self._expiry.set(row, 0.0 if pinned or not ttl_s else now_s + ttl_s)
            self._set_priority(row, priority)

    def expire_at(self, rows: Rows, expires_s: float) -> None:
        """Let the priority of resident rows fall back to the default at `expires_s`."""
        self.index.check_resident(rows)
        for row in rows.tolist():
            self._expiry.set(row, expires_s)

    def expire(self, now_s: float) -> None:
        """Let priorities fall back whose time is over; a pinned block keeps its own."""
        index = self.index
        for row in self._expiry.due(now_s):
            if index.pins.item(row):
                continue  # queued again by `unpin`
            index.expires_s[row] = index.ttl_s[row] = 0.0
            self._set_priority(row, DEFAULT_PRIORITY)

    # ---- restart

    def load(self, blocks: StoredBlocks) -> list[bool]:
        """Fill a new table; False where an extent does not fit or overlaps another.

        Keys must be distinct. The blocks kept are rows 0, 1, 2, ... in their order.
        A million take a second or two.
        """
        index = self.index
        if len(index) or self.space.used_bytes or self.evicted_blocks:
            raise InvariantError("load() is for a table that has held nothing")
        taken = self.space.claim(blocks.offsets, blocks.nbytes)
        kept: list[bool] = taken.tolist()
        keys, parents = list(compress(blocks.keys, kept)), list(compress(blocks.parents, kept))
        count = len(keys)
        rows = index.take(count)
        index.rows_by_key.update(zip(keys, rows.tolist(), strict=True))
        if len(index) != count or rows[-1:].tolist() not in ([], [count - 1]):
            raise InvariantError("a key stands twice among the blocks to load, or rows were used")
        index.keys[:count], index.parents[:count] = keys, parents
        index.offset[rows], index.nbytes[rows] = blocks.offsets[taken], blocks.nbytes[taken]
        numbers = {name: self._number_of(name) for name in set(blocks.namespaces)}
        index.namespace[rows] = [numbers[name] for name in compress(blocks.namespaces, kept)]
        index.priority[rows] = blocks.priorities[taken]
        index.rank[rows] = np.arange(-count, 0)
        index.move(rows, State.RESIDENT)
        self._order.fill(keys, parents)
        for row in np.flatnonzero(index.priority > DEFAULT_PRIORITY).tolist():
            self.protected_bytes[index.namespace.item(row)] += index.nbytes.item(row)
        self._hold(rows, 1)
        for row, expires_s in enumerate(blocks.expires_s[taken].tolist()):
            if expires_s > 0:
                self._expiry.set(row, expires_s)
        return kept

    # ---- inside

    def _admit(self, rows: Rows, batch: Batch) -> None:
        index = self.index
        number = self._number_of(batch.namespace)
        listed = rows.tolist()
        for row, key, parent in zip(listed, batch.keys, batch.parents, strict=True):
            index.keys[row] = key
            index.parents[row] = parent
        index.namespace[rows] = number
        index.priority[rows] = batch.priority
        index.ttl_s[rows] = batch.ttl_s
        index.expires_s[rows] = 0.0
        index.rank[rows] = self.policy.admitted(rows)
        index.state[rows] = State.RESIDENT
        nbytes = int(index.nbytes[rows].sum())
        self._held[:, number] += (len(listed), nbytes)
        if batch.priority > DEFAULT_PRIORITY:
            self.protected_bytes[number] += nbytes
        self._order.admit(listed, batch.keys, batch.parents)
        if self.listener is not None and listed:
            self.listener.stored(batch.namespace, batch.keys, batch.parents)

    def _forget(self, rows: Rows, listed: list[int]) -> None:
        """Take rows that have become EVICTING out of every view but space and order."""
        index = self.index
        by_key, keys = index.rows_by_key, index.keys
        gone = [key for row in listed if (key := keys[row]) is not None]
        for row, key in zip(listed, gone, strict=True):
            del by_key[key]
            keys[row] = None
        self._evicted.update(gone)
        if len(self._evicted) >= EVICTED_REMEMBERED:
            self._evicted, self._evicted_before = set(), self._evicted
        self._hold(rows, -1)
        index.expires_s[rows] = 0.0
        for row in rows[index.priority[rows] > DEFAULT_PRIORITY].tolist():
            self.protected_bytes[index.namespace.item(row)] -= index.nbytes.item(row)
        self.evicted_blocks += len(listed)
        if self.listener is not None and gone:
            self._tell_removed(self.listener, rows, gone)

    def _tell_removed(self, listener: Listener, rows: Rows, keys: list[Key]) -> None:
        numbers = self.index.namespace[rows]
        first = numbers.item(0)
        if (numbers == first).all():
            listener.removed(self._namespaces[first], keys)
            return
        for number in np.unique(numbers).tolist():
            own = (numbers == number).tolist()
            listener.removed(self._namespaces[number], list(compress(keys, own)))

    def _number_of(self, namespace: bytes) -> int:
        number = self._namespace_ids.setdefault(namespace, len(self._namespaces))
        if number == len(self._namespaces):
            self._namespaces.append(namespace)
            if number == self._held.shape[1]:
                self._held = np.concatenate([self._held, np.zeros_like(self._held)], axis=1)
        return number

    def _hold(self, rows: Rows, sign: int) -> None:
        """Count these rows in (1) or out (-1) of what their namespaces hold."""
        numbers = self.index.namespace[rows]
        np.add.at(self._held[0], numbers, sign)
        np.add.at(self._held[1], numbers, sign * self.index.nbytes[rows])

    def _add_pins(self, rows: Rows, count: int) -> None:
        if self.index.are_distinct(rows):
            self.index.pins[rows] += count
        else:
            np.add.at(self.index.pins, rows, count)

    def _set_priority(self, row: int, priority: int) -> None:
        index = self.index
        old = index.priority.item(row)
        if old == priority:
            return
        change = (priority > DEFAULT_PRIORITY) - (old > DEFAULT_PRIORITY)
        self.protected_bytes[index.namespace.item(row)] += index.nbytes.item(row) * change
        index.priority[row] = priority
        if priority < old:
            self._order.lowered(row)

    def check_invariants(self) -> None:
        """Raises InvariantError unless space, rows, chains, candidates and times agree."""
        index = self.index
        index.check_invariants()
        self.space.check_invariants()
        self._order.check_invariants()
        self._expiry.check_invariants()
        used = np.flatnonzero(index.state != State.FREE)
        extents = sorted(zip(index.offset[used].tolist(), index.nbytes[used].tolist(), strict=True))
        if sum(align_up(nbytes) for _, nbytes in extents) != self.space.used_bytes:
            raise InvariantError("the rows' extents and the allocator's used bytes disagree")
        for (offset, nbytes), (following, _) in pairwise(extents):
            if offset + align_up(nbytes) > following:
                raise InvariantError(f"two blocks share the bytes at {following}")
        protected: Counter[int] = Counter()
        for row in index.rows_by_key.values():
            if index.priority[row] > DEFAULT_PRIORITY:
                protected[index.namespace.item(row)] += index.nbytes.item(row)
        if protected != +self.protected_bytes:
            raise InvariantError("bytes above default priority are counted wrongly")
        held = np.zeros_like(self._held)
        rows = np.array(list(index.rows_by_key.values()), dtype=np.int64)
        np.add.at(held[0], index.namespace[rows], 1)
        np.add.at(held[1], index.namespace[rows], index.nbytes[rows])
        if (held != self._held).any():
            raise InvariantError("what each namespace holds is counted wrongly")


def _check_priority(priority: int) -> None:
    if not 0 <= priority <= MAX_PRIORITY:
        raise IllegalMoveError(f"priority {priority} is not within 0 and {MAX_PRIORITY}")

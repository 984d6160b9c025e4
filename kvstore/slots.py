"""The bookkeeping of a local tier: which block lies where, and who must go next.

RAM arena and NVMe slab are the same problem: extents of one space, rows of one
table, an order of eviction. `SlotTable` is that problem without the bytes.
Always, under every policy: the lowest priority goes first, a chain's deepest
block before its ancestors, and never a pinned block.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from itertools import compress, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.allocator import ExtentAllocator, align_up
from kvstore.errors import IllegalMoveError, InvariantError
from kvstore.hashing import Key
from kvstore.index import NO_ENTRY, Index, State
from kvstore.policy import EvictionPolicy, Lru, Rows
from kvstore.retention import DEFAULT_PRIORITY, MAX_PRIORITY

EVICTED_REMEMBERED = 65_536  # keys; so that a miss can say "evicted" rather than "absent"


class Batch(NamedTuple):
    """Blocks of one namespace that become resident together; one item a block."""

    namespace: bytes
    keys: Sequence[Key]
    parents: Sequence[Key]
    priority: int = DEFAULT_PRIORITY
    ttl_s: float = 0.0  # 0: the priority never falls back


class StoredBlocks(NamedTuple):
    """Blocks that survived a restart, as columns; least recently used first."""

    keys: list[Key]
    parents: list[Key]
    namespaces: list[bytes]
    offsets: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    priorities: NDArray[np.uint8]
    expires_s: NDArray[np.float64]


class SlotTable:
    """Extents, rows and eviction order of one tier. Not thread-safe: the owner locks.

    Rows are int64 arrays, valid until freed. No method does I/O or reads a clock.
    """

    def __init__(self, capacity_bytes: int, policy: EvictionPolicy | None = None) -> None:
        self.index = Index()
        self.space = ExtentAllocator(capacity_bytes)
        self.policy: EvictionPolicy = policy or Lru()
        self.evicted_blocks = 0
        self.protected_bytes: Counter[int] = Counter()  # namespace id -> above default priority
        self._namespace_ids: dict[bytes, int] = {}
        self._namespaces: list[bytes] = []
        self._children: dict[Key, int] = {}  # resident blocks, by the parent that they name
        self._candidates: list[tuple[int, int, int]] = []  # heap: priority, rank, row
        self._entry: dict[int, tuple[int, int]] = {}  # row -> its one live heap entry
        self._expiry: list[tuple[float, int]] = []  # heap: expires_s, row
        self._evicted: OrderedDict[Key, None] = OrderedDict()

    # ---- finding

    def __len__(self) -> int:
        return len(self.index)

    def find(self, keys: Sequence[Key]) -> list[int | None]:
        """Row of each resident block. No side effect."""
        return self.index.find(keys)

    def was_evicted(self, key: Key) -> bool:
        """Whether the block was here and evicted (the last 65,536 are remembered)."""
        return key in self._evicted

    def namespace_id(self, fingerprint: bytes) -> int:
        """The small number that stands for a namespace in the `namespace` column."""
        number = self._namespace_ids.get(fingerprint)
        if number is None:
            number = self._namespace_ids[fingerprint] = len(self._namespaces)
            self._namespaces.append(fingerprint)
        return number

    def namespace(self, row: int) -> bytes:
        return self._namespaces[self.index.namespace.item(row)]

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
        index = self.index
        by_key = index.rows_by_key
        if (index.state[rows] != State.RESERVED).any():
            raise IllegalMoveError("only reserved rows can be committed")
        won = []
        for row, key in zip(rows.tolist(), batch.keys, strict=True):
            won.append(by_key.setdefault(key, row) == row)
        if all(won):
            self._admit(rows, batch)
            return won
        mask = np.array(won)
        self.free(rows[~mask])
        parents = [parent for parent, mine in zip(batch.parents, won, strict=True) if mine]
        keys = [key for key, mine in zip(batch.keys, won, strict=True) if mine]
        if keys:
            self._admit(rows[mask], batch._replace(keys=keys, parents=parents))
        return won

    def free(self, rows: Rows) -> None:
        """RESERVED or EVICTING -> FREE: the extents may be given out again."""
        self.index.give_back(rows)
        offsets, sizes = self.index.offset[rows].tolist(), self.index.nbytes[rows].tolist()
        self.space.free(zip(offsets, sizes, strict=True))

    def pin(self, rows: Rows) -> None:
        """A pinned block is not evicted. Pins count; a row may stand in `rows` twice."""
        if (self.index.state[rows] != State.RESIDENT).any():
            raise IllegalMoveError("only resident rows can be pinned")
        np.add.at(self.index.pins, rows, 1)

    def unpin(self, rows: Rows, now_s: float) -> None:
        """Undo one `pin` a row; the clock of a retention starts when the last is undone."""
        index = self.index
        np.subtract.at(index.pins, rows, 1)
        if (index.pins[rows] < 0).any():
            np.add.at(index.pins, rows, 1)
            raise IllegalMoveError("a row was unpinned more often than pinned")
        for row in rows[(index.ttl_s[rows] > 0) & (index.pins[rows] == 0)].tolist():
            self._start_clock(row, now_s)

    def touch(self, rows: Rows) -> None:
        """These blocks were used again."""
        self.index.rank[rows] = self.policy.touched(rows, self.index.rank[rows])

    def evict(self, rows: Rows) -> None:
        """RESIDENT -> EVICTING: no longer found. The caller calls `free` when it may."""
        self.index.move(rows, State.EVICTING)
        self.evicted_blocks += len(rows)
        for row in rows.tolist():
            self._forget(row)

    def victims(
        self, nbytes: int, count: int, priority: int, now_s: float, keep: Collection[int] = ()
    ) -> Rows:
        """Evict blocks with no better claim than `priority` until their extents add up.

        Makes for `count` extents of `nbytes` more than are free now. The rows come
        back EVICTING; after `free(rows)` a `reserve` may still get fewer than
        `count` when the free space is in pieces: ask again with what is missing.
        `keep` are rows that must stay.
        """
        self._expire(now_s)
        index = self.index
        chosen: list[int] = []
        aside: list[int] = []
        wanted = count * align_up(nbytes)
        while wanted > 0:
            row = self._pop_candidate(priority)
            if row is None:
                break
            if index.pins.item(row) or row in keep:
                aside.append(row)
                continue
            wanted -= align_up(index.nbytes.item(row))
            chosen.append(row)
            self._forget(row)
        for row in aside:
            self._offer(row)
        rows = np.array(chosen, dtype=np.int64)
        index.move(rows, State.EVICTING)
        self.evicted_blocks += len(rows)
        return rows

    # ---- retention

    def retain(self, rows: Rows, priority: int, ttl_s: float, now_s: float) -> None:
        """Set priority and TTL (0: never falls back) of resident rows."""
        for row in rows.tolist():
            self.index.ttl_s[row] = ttl_s
            self.index.expires_s[row] = 0.0
            self._set_priority(row, priority)
            if ttl_s > 0 and not self.index.pins[row]:
                self._start_clock(row, now_s)

    def expire_at(self, rows: Rows, expires_s: float) -> None:
        """Let the priority of resident rows fall back to the default at `expires_s`."""
        for row in rows.tolist():
            self.index.expires_s[row] = expires_s
            heapq.heappush(self._expiry, (expires_s, row))

    # ---- restart

    def load(self, blocks: StoredBlocks) -> list[bool]:
        """Fill an empty table; False where an extent does not fit or overlaps another.

        Keys must be distinct. The blocks kept are rows 0, 1, 2, ... in their order.
        A million take a second or two.
        """
        index = self.index
        if len(index.rows_by_key) or self.space.used_bytes:
            raise InvariantError("load() is for an empty table")
        taken = self.space.claim(blocks.offsets, blocks.nbytes)
        kept: list[bool] = taken.tolist()
        keys, parents = list(compress(blocks.keys, kept)), list(compress(blocks.parents, kept))
        count = len(keys)
        rows = index.take(count)
        index.rows_by_key.update(zip(keys, range(count), strict=True))
        if len(index.rows_by_key) != count:
            raise InvariantError("a key stands twice among the blocks to load")
        index.keys[:count], index.parents[:count] = keys, parents
        index.offset[rows], index.nbytes[rows] = blocks.offsets[taken], blocks.nbytes[taken]
        numbers = {namespace: self.namespace_id(namespace) for namespace in set(blocks.namespaces)}
        index.namespace[rows] = [numbers[name] for name in compress(blocks.namespaces, kept)]
        index.priority[rows] = blocks.priorities[taken]
        index.expires_s[rows] = blocks.expires_s[taken]
        index.rank[rows] = np.arange(-count, 0)
        index.move(rows, State.RESIDENT)
        self._children = dict(Counter(parents))
        leaves = [row for row, key in enumerate(keys) if key not in self._children]
        ranks, priorities = index.rank[leaves].tolist(), index.priority[leaves].tolist()
        self._entry = dict(zip(leaves, zip(priorities, ranks, strict=True), strict=True))
        self._candidates = list(zip(priorities, ranks, leaves, strict=True))
        heapq.heapify(self._candidates)
        for row in np.flatnonzero(index.priority > DEFAULT_PRIORITY).tolist():
            self.protected_bytes[int(index.namespace[row])] += int(index.nbytes[row])
        for row in np.flatnonzero(index.expires_s > 0).tolist():
            heapq.heappush(self._expiry, (float(index.expires_s[row]), row))
        return kept

    # ---- inside

    def _admit(self, rows: Rows, batch: Batch) -> None:
        index = self.index
        number = self.namespace_id(batch.namespace)
        children = self._children
        row_list = rows.tolist()
        for row, key, parent in zip(row_list, batch.keys, batch.parents, strict=True):
            index.keys[row] = key
            index.parents[row] = parent
            children[parent] = children.get(parent, 0) + 1
        if self._evicted:
            for key in batch.keys:
                self._evicted.pop(key, None)
        index.namespace[rows] = number
        index.priority[rows] = batch.priority
        index.ttl_s[rows] = batch.ttl_s
        index.expires_s[rows] = 0.0
        index.rank[rows] = ranks = self.policy.admitted(rows)
        index.move(rows, State.RESIDENT)
        if batch.priority > DEFAULT_PRIORITY:
            self.protected_bytes[number] += int(index.nbytes[rows].sum())
        for row, key, rank in zip(row_list, batch.keys, ranks.tolist(), strict=True):
            if key not in children:
                self._entry[row] = (batch.priority, rank)
                heapq.heappush(self._candidates, (batch.priority, rank, row))

    def _forget(self, row: int) -> None:
        """Take a row that leaves for EVICTING out of every view but space."""
        index = self.index
        key, parent = index.keys[row], index.parents[row]
        assert key is not None
        del index.rows_by_key[key]
        index.keys[row] = None
        self._entry.pop(row, None)
        index.expires_s[row] = 0.0
        if index.priority.item(row) > DEFAULT_PRIORITY:
            self.protected_bytes[index.namespace.item(row)] -= index.nbytes.item(row)
        self._evicted[key] = None
        if len(self._evicted) > EVICTED_REMEMBERED:
            self._evicted.popitem(last=False)
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
            return
        del self._children[parent]
        parent_row = index.rows_by_key.get(parent)
        if parent_row is not None:
            self._offer(parent_row)

    def _offer(self, row: int) -> None:
        """Make a resident row a candidate, at its present priority and rank."""
        entry = (self.index.priority.item(row), self.index.rank.item(row))
        if self._entry.get(row, NO_ENTRY) != entry:
            self._entry[row] = entry
            heapq.heappush(self._candidates, (*entry, row))

    def _pop_candidate(self, priority: int) -> int | None:
        """The row that must go first, if its priority is not above `priority`.

        Entries are corrected when they surface, not when a block is touched:
        a touch is one vector assignment, and most blocks are touched more often
        than they are considered for eviction.
        """
        heap, index = self._candidates, self.index
        while heap and heap[0][0] <= priority:
            entry_priority, entry_rank, row = heapq.heappop(heap)
            if self._entry.get(row) != (entry_priority, entry_rank):
                continue
            del self._entry[row]
            if index.keys[row] in self._children:
                continue  # a child has come since; the row is offered again when it goes
            if entry_rank != index.rank.item(row) or entry_priority != index.priority.item(row):
                self._offer(row)
                continue
            return row
        return None

    def _set_priority(self, row: int, priority: int) -> None:
        index = self.index
        old = int(index.priority[row])
        if not 0 <= priority <= MAX_PRIORITY:
            raise IllegalMoveError(f"priority {priority} is not within 0 and {MAX_PRIORITY}")
        if old == priority:
            return
        number, nbytes = int(index.namespace[row]), int(index.nbytes[row])
        self.protected_bytes[number] += nbytes * (
            (priority > DEFAULT_PRIORITY) - (old > DEFAULT_PRIORITY)
        )
        index.priority[row] = priority
        if row in self._entry:
            self._offer(row)

    def _start_clock(self, row: int, now_s: float) -> None:
        expires_s = now_s + float(self.index.ttl_s[row])
        self.index.expires_s[row] = expires_s
        heapq.heappush(self._expiry, (expires_s, row))

    def _expire(self, now_s: float) -> None:
        """Let priorities fall back whose time is over; a pinned block keeps its own."""
        while self._expiry and self._expiry[0][0] <= now_s:
            expires_s, row = heapq.heappop(self._expiry)
            if self.index.expires_s[row] != expires_s or self.index.pins[row]:
                continue  # freed or renewed since; or in use, and its clock starts anew
            self.index.expires_s[row] = self.index.ttl_s[row] = 0.0
            self._set_priority(row, DEFAULT_PRIORITY)

    def check_invariants(self) -> None:
        """Raises InvariantError unless space, rows, chains and candidates agree."""
        index = self.index
        index.check_invariants()
        self.space.check_invariants()
        used = np.flatnonzero(index.state != State.FREE)
        extents = sorted(zip(index.offset[used].tolist(), index.nbytes[used].tolist(), strict=True))
        if sum(align_up(nbytes) for _, nbytes in extents) != self.space.used_bytes:
            raise InvariantError("the rows' extents and the allocator's used bytes disagree")
        for (offset, nbytes), (following, _) in pairwise(extents):
            if offset + align_up(nbytes) > following:
                raise InvariantError(f"two blocks share the bytes at {following}")
        resident = index.rows_by_key.values()
        if Counter(index.parents[row] for row in resident) != Counter(self._children):
            raise InvariantError("the counts of children are wrong")
        live = set(self._candidates)
        for key, row in index.rows_by_key.items():
            entry = self._entry.get(row)
            if key not in self._children and (entry is None or (*entry, row) not in live):
                raise InvariantError(f"row {row} ends a chain but can never be evicted")
            if entry is not None and entry[0] > index.priority[row]:
                raise InvariantError(f"row {row} would be evicted too late")
        if not set(self._entry) <= set(resident):
            raise InvariantError("a row that is not resident is a candidate for eviction")
        self._check_protected(resident)

    def _check_protected(self, resident: Iterable[int]) -> None:
        protected: Counter[int] = Counter()
        for row in resident:
            if self.index.priority[row] > DEFAULT_PRIORITY:
                protected[int(self.index.namespace[row])] += int(self.index.nbytes[row])
        if protected != +self.protected_bytes:
            raise InvariantError("bytes above default priority are counted wrongly")

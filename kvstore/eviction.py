"""Whose turn it is to leave a tier: only ends of chains, lowest priority first, then rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from kvstore.allocator import align_up
from kvstore.errors import InvariantError
from kvstore.hashing import Key
from kvstore.index import Index
from kvstore.rowheap import RowHeap

ANY_RANK = 1 << 62


class EvictionOrder:
    """Resident rows that no resident row names as its parent, by priority and rank.

    Claims are corrected when they surface, not when a block is touched: a touch
    is one vector assignment, and most blocks are touched more often than they
    are considered for eviction. A claim in the heap is therefore never above
    the true one, but may be below.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._children: dict[Key, int] = {}  # resident blocks, by the parent that they name
        self._ends: RowHeap[tuple[int, int]] = RowHeap()
        self._parked: set[int] = set()  # came up while pinned; offered again when unpinned

    def admit(self, rows: Sequence[int], keys: Sequence[Key], parents: Sequence[Key]) -> None:
        """These rows are resident now, with their keys, priorities and ranks set."""
        children = self._children
        for parent in parents:
            children[parent] = children.get(parent, 0) + 1
        for row, key in zip(rows, keys, strict=True):
            if key not in children:
                self.offer(row)

    def fill(self, keys: Sequence[Key], parents: Sequence[Key]) -> None:
        """As `admit` for rows 0, 1, 2, ... of a table that held nothing."""
        self._children = dict(Counter(parents))
        ends = [row for row, key in enumerate(keys) if key not in self._children]
        priorities, ranks = self._index.priority[ends].tolist(), self._index.rank[ends].tolist()
        self._ends.fill(dict(zip(ends, zip(priorities, ranks, strict=True), strict=True)))

    def choose(self, wanted_bytes: int, priority: int, keep: Collection[int | None]) -> list[int]:
        """Take out rows, in order, until their extents hold `wanted_bytes`.

        None that is pinned, in `keep`, or of a priority above `priority`. They
        must have left the index before anything else is asked here.
        """
        nbytes, pins = self._index.nbytes, self._index.pins
        chosen: list[int] = []
        kept: list[int] = []
        row = self._next(priority) if wanted_bytes > 0 else None
        while row is not None:
            parent: int | None = None
            if pins.item(row):
                self._parked.add(row)
            elif row in keep:
                kept.append(row)
            else:
                chosen.append(row)
                wanted_bytes -= align_up(nbytes.item(row))
                parent = self._detach(row)
            if wanted_bytes <= 0:
                kept += [] if parent is None else [parent]
                break
            row = self._next(priority) if parent is None else self._either(parent, priority)
        for row in kept:
            self.offer(row)
        return chosen

    def remove(self, rows: Sequence[int]) -> None:
        """These rows have left the index out of turn."""
        for row in rows:
            self._ends.discard(row)
            parent = self._detach(row)
            if parent is not None:
                self.offer(parent)

    def offer(self, row: int) -> None:
        """A resident row ends a chain, or its claim has become a lesser one."""
        index = self._index
        self._ends.put(row, (index.priority.item(row), index.rank.item(row)))

    def lowered(self, row: int) -> None:
        """The priority of a resident row has become lower."""
        if row in self._ends:
            self.offer(row)

    def unpinned(self, rows: Sequence[int]) -> None:
        """The last pin of these resident rows is gone."""
        if self._parked:
            for row in self._parked.intersection(rows):
                self._parked.discard(row)
                self.offer(row)

    def _next(self, priority: int) -> int | None:
        index = self._index
        while (least := self._ends.pop_up_to((priority, ANY_RANK))) is not None:
            claim, row = least
            if index.keys[row] in self._children:
                continue  # a child has come since; the row is offered again when it goes
            if claim != (index.priority.item(row), index.rank.item(row)):
                self.offer(row)
                continue
            return row
        return None

    def _either(self, parent: int, priority: int) -> int | None:
        """Whose turn it is, `parent` having just become the end of a chain.

        Mostly its own, and then the heap need not be touched: a chain that was
        used as a whole leaves as a whole.
        """
        index = self._index
        claim = (index.priority.item(parent), index.rank.item(parent))
        if claim[0] <= priority and self._ends.all_after(parent, claim):
            self._ends.discard(parent)
            return parent
        self._ends.put(parent, claim)
        return self._next(priority)

    def _detach(self, row: int) -> int | None:
        """Take a row out of its chain; returns its parent if that ends the chain now."""
        parent = self._index.parents[row]
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
            return None
        del self._children[parent]
        return self._index.rows_by_key.get(parent)

    def check_invariants(self) -> None:
        """Raises InvariantError unless every end of a chain can have its turn, in time."""
        index = self._index
        resident = index.rows_by_key.values()
        if Counter(index.parents[row] for row in resident) != Counter(self._children):
            raise InvariantError("the counts of children are wrong")
        if not self._ends.is_consistent():
            raise InvariantError("a claim is not in the heap, or the heap has grown too large")
        for key, row in index.rows_by_key.items():
            claim = self._ends.get(row)
            parked = row in self._parked and index.pins.item(row) > 0
            if key not in self._children and claim is None and not parked:
                raise InvariantError(f"row {row} ends a chain but can never be evicted")
            if claim is not None and claim > (index.priority.item(row), index.rank.item(row)):
                raise InvariantError(f"row {row} would be evicted too late")
        if sum(row in self._ends for row in resident) != len(self._ends):
            raise InvariantError("a row that is not resident is a candidate for eviction")
        if any(not index.pins.item(row) for row in self._parked):
            raise InvariantError("a row is parked that is not pinned")

"""When raised or lowered priorities fall back to the default."""

from __future__ import annotations

from kvstore.errors import InvariantError
from kvstore.index import Index
from kvstore.rowheap import RowHeap


class Expiry:
    """Rows by the time in their `expires_s` column (0: never).

    A row is queued once. When its time is put off, as at each release of a
    lease, the queue is not touched: the row surfaces too early and is queued anew.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._queue: RowHeap[float] = RowHeap()

    def set(self, row: int, expires_s: float) -> None:
        """Let the row fall due at `expires_s`, instead of what was set before (0: never)."""
        self._index.expires_s[row] = expires_s
        queued_s = self._queue.get(row)
        if expires_s and (queued_s is None or expires_s < queued_s):
            self._queue.put(row, expires_s)

    def due(self, now_s: float) -> list[int]:
        """Take out the rows whose time is over. Their `expires_s` stays as it is."""
        rows = []
        while (least := self._queue.pop_up_to(now_s)) is not None:
            row = least[1]
            expires_s = self._index.expires_s.item(row)
            if expires_s > now_s:
                self._queue.put(row, expires_s)
            elif expires_s:
                rows.append(row)
        return rows

    def check_invariants(self) -> None:
        """Raises InvariantError unless every unpinned row with a time is queued by then."""
        index = self._index
        if not self._queue.is_consistent():
            raise InvariantError("an expiry is not in the heap, or the heap has grown too large")
        for row in index.rows_by_key.values():
            expires_s, queued_s = index.expires_s.item(row), self._queue.get(row)
            late = queued_s is None or queued_s > expires_s
            if expires_s and late and not index.pins.item(row):
                raise InvariantError(f"row {row} would keep its priority too long")

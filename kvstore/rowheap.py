"""Rows ordered by a claim, where a claim may change often and the order is asked for rarely."""

from __future__ import annotations

import heapq
from typing import Any, Generic, TypeVar

Claim = TypeVar("Claim", float, tuple[int, int])

SLACK = 64  # stale entries that are not worth a rebuild


class RowHeap(Generic[Claim]):
    """Each row at most once, least claim first.

    A row whose claim is replaced leaves a stale entry behind, which is dropped
    when it surfaces; when stale entries outnumber live ones the heap is
    rebuilt, so it never holds more than twice as many entries as rows.
    """

    def __init__(self) -> None:
        self._claims: dict[int, Claim] = {}
        self._heap: list[tuple[Claim, int]] = []

    def __len__(self) -> int:
        return len(self._claims)

    def __contains__(self, row: int) -> bool:
        return row in self._claims

    def get(self, row: int) -> Claim | None:
        return self._claims.get(row)

    def put(self, row: int, claim: Claim) -> None:
        """Give `row` this claim instead of the one it had."""
        if self._claims.get(row) == claim:
            return
        self._claims[row] = claim
        heapq.heappush(self._heap, (claim, row))
        self._compact()

    def fill(self, claims: dict[int, Claim]) -> None:
        """Replace everything."""
        self._claims = claims
        self._rebuild()

    def discard(self, row: int) -> None:
        if self._claims.pop(row, None) is not None:
            self._compact()

    def pop_up_to(self, limit: Any) -> tuple[Claim, int] | None:
        """Take out the row of least claim, if that claim is at most `limit`."""
        heap, claims = self._heap, self._claims
        while heap and heap[0][0] <= limit:
            claim, row = heapq.heappop(heap)
            if claims.get(row) == claim:
                del claims[row]
                return claim, row
        return None

    def all_after(self, row: int, claim: Claim) -> bool:
        """Whether `row` with `claim` would come first. A stale entry may make it say no."""
        return not self._heap or (claim, row) <= self._heap[0]

    def _compact(self) -> None:
        if len(self._heap) > 2 * len(self._claims) + SLACK:
            self._rebuild()

    def _rebuild(self) -> None:
        self._heap = [(claim, row) for row, claim in self._claims.items()]
        heapq.heapify(self._heap)

    def is_consistent(self) -> bool:
        """Whether every claim can surface, and the heap is within its bound."""
        live = {(claim, row) for row, claim in self._claims.items()}
        return live <= set(self._heap) and len(self._heap) <= 2 * len(live) + SLACK

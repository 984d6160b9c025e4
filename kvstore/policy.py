"""In which order blocks of equal priority leave a tier.

A policy gives each block a rank; the candidate with the least rank goes first.
Who is a candidate (unpinned, nothing resident below it in its chain) and that
a lower priority goes before any rank is not the policy's to say: `SlotTable`
holds to that under every policy.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Ranks = NDArray[np.int64]


class EvictionPolicy(Protocol):
    """Ranks rows of one table. Called under the owner's lock; must not block."""

    def admitted(self, rows: Rows) -> Ranks:
        """Ranks of blocks that have just become resident, in the order given."""
        ...

    def touched(self, rows: Rows, ranks: Ranks) -> Ranks:
        """New ranks of blocks that were used again, none below its old one in `ranks`."""
        ...


class Lru:
    """Least recently used first: a rank is the number of the use."""

    def __init__(self) -> None:
        self._uses = 0

    def admitted(self, rows: Rows) -> Ranks:
        return self._next(len(rows))

    def touched(self, rows: Rows, ranks: Ranks) -> Ranks:
        return self._next(len(rows))

    def _next(self, count: int) -> Ranks:
        self._uses += 1
        return np.full(count, self._uses, dtype=np.int64)


class Fifo:
    """Oldest first, however often it was used: the baseline that LRU must beat."""

    def __init__(self) -> None:
        self._admissions = 0

    def admitted(self, rows: Rows) -> Ranks:
        self._admissions += 1
        return np.full(len(rows), self._admissions, dtype=np.int64)

    def touched(self, rows: Rows, ranks: Ranks) -> Ranks:
        return ranks

"""What a store holds, block by block, for those who run it: the tiers' tables, page by page.

No bytes of blocks are touched, and no page holds a lock for longer than it takes to copy a
few thousand rows. So a listing of a store in use is true row by row, not as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.hashing import Key
from kvstore.identity import Namespace
from kvstore.tier import Checked

PAGE_ROWS = 4096  # of a table, copied under its lock at once


class Page(NamedTuple):
    """Part of a tier's table: `rows` [n] of `frame.RECORD_DTYPE`, times by the wall clock.

    RAM says nothing of offsets, checksums, and when a block was made. `following` is where
    the next page begins; None after the last.
    """

    rows: NDArray[np.void]
    following: int | None


class Inventory(Protocol):
    """The holdings of a store in this process, or of a daemon's. Safe from any thread.

    Blocks of all tenants, by the names that the store itself knows them by.
    """

    def namespaces(self) -> Mapping[bytes, Namespace]:
        """Every namespace whose record was kept, by fingerprint; maybe without blocks."""
        ...

    def tiers(self) -> list[str]:
        """Names of the tiers that have tables, the fastest first."""
        ...

    def page(self, tier: str, start: int = 0) -> Page:
        """What is held from row `start` on. Raises RequestError for another tier."""
        ...

    def evict(self, keys: Sequence[Key]) -> int:
        """As `BlockStore.evict`, whatever namespaces the blocks are of."""
        ...

    def check(self, keys: Sequence[Key]) -> Checked:
        """Compare the checksums of blocks on NVMe; the damaged are dropped. Blocks while it reads.

        Raises ConnectionLostError where the daemon goes away.
        """
        ...


def listing(inventory: Inventory, tier: str) -> NDArray[np.void]:
    """All that a tier holds, [n] of `frame.RECORD_DTYPE`: 140 bytes a block."""
    found = []
    following: int | None = 0
    while following is not None:
        rows, following = inventory.page(tier, following)
        found.append(rows)
    return np.concatenate(found)

"""Who owns which bytes of an arena or a slab file: extents, aligned, coalesced.

Best fit over exact free lengths. A batch is carved from as few free extents as
possible, so that blocks written together lie together and one call can move
them. Pure and single-threaded: the owner holds the lock.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import InvariantError

ALIGN_BYTES = 4096


def align_up(nbytes: int) -> int:
    """The least multiple of the alignment that holds `nbytes`."""
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES


class ExtentAllocator:
    """Free space of `[0, capacity_bytes)`; offsets and lengths are multiples of 4 KiB."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes // ALIGN_BYTES * ALIGN_BYTES
        self.free_bytes = 0
        self._length_at: dict[int, int] = {}  # free extent: start -> length
        self._start_at: dict[int, int] = {}  # free extent: end -> start
        self._by_length: dict[int, dict[int, None]] = {}  # length -> starts, oldest first
        self._lengths: list[int] = []  # the keys of _by_length, sorted
        if self.capacity_bytes:
            self._insert(0, self.capacity_bytes)

    def allocate(self, nbytes: int, count: int) -> list[int]:
        """Offsets of up to `count` extents of `align_up(nbytes)` bytes each.

        Fewer when there is no room for more; never partly inside a used extent.
        """
        size = align_up(nbytes)
        if size <= 0 or count <= 0:
            return []
        offsets: list[int] = []
        while len(offsets) < count and self._lengths:
            missing = (count - len(offsets)) * size
            # The smallest free extent that holds all that is missing, else the largest.
            place = min(bisect_left(self._lengths, missing), len(self._lengths) - 1)
            length = self._lengths[place]
            taken = min(length, missing) // size * size
            if not taken:
                break
            start = next(iter(self._by_length[length]))
            self._remove(start, length)
            if length > taken:
                self._insert(start + taken, length - taken)
            offsets.extend(range(start, start + taken, size))
        return offsets

    def free(self, offsets: NDArray[np.int64], nbytes: NDArray[np.int64]) -> None:
        """Give back extents, each given out by `allocate` or `claim`.

        Raises InvariantError, and takes none of the batch, where two of them overlap.
        """
        if not len(offsets):
            return
        order = np.argsort(offsets)
        starts = offsets[order]
        ends = starts + -(-nbytes[order] // ALIGN_BYTES) * ALIGN_BYTES
        if (starts[1:] < ends[:-1]).any():
            raise InvariantError("two extents that were to be freed overlap")
        breaks = np.flatnonzero(starts[1:] != ends[:-1])
        runs = zip(
            [int(starts[0]), *starts[breaks + 1].tolist()],
            [*ends[breaks].tolist(), int(ends[-1])],
            strict=True,
        )
        for start, end in runs:
            self._give_back(start, end)

    def claim(self, offsets: NDArray[np.int64], nbytes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Take these extents out of an allocator that is wholly free: for restarts.

        One answer an extent, in the order given: False where it is misaligned,
        outside the arena, or overlaps one of lower offset; such an extent is not taken.
        """
        if self.free_bytes != self.capacity_bytes:
            raise InvariantError("claim() is for an allocator that has given nothing out")
        taken: NDArray[np.bool_] = (offsets >= 0) & (offsets % ALIGN_BYTES == 0) & (nbytes > 0)
        # Each against the capacity first: sums of absurd numbers would wrap around.
        taken &= (offsets <= self.capacity_bytes) & (nbytes <= self.capacity_bytes)
        ends = np.where(taken, offsets + -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES, 0)
        taken &= ends <= self.capacity_bytes
        order = np.flatnonzero(taken)
        order = order[np.argsort(offsets[order], kind="stable")]
        reach = np.concatenate([[0], np.maximum.accumulate(ends[order])[:-1]])[: len(order)]
        taken[order[offsets[order] < reach]] = False
        kept = order[offsets[order] >= reach]
        starts = np.append(offsets[kept], self.capacity_bytes)
        free_from = np.insert(ends[kept], 0, 0)
        gaps = np.flatnonzero(starts > free_from)
        if self.capacity_bytes:
            self._remove(0, self.capacity_bytes)
        for start, end in zip(free_from[gaps].tolist(), starts[gaps].tolist(), strict=True):
            self._insert(start, end - start)
        return taken

    @property
    def used_bytes(self) -> int:
        return self.capacity_bytes - self.free_bytes

    @property
    def largest_free_bytes(self) -> int:
        return self._lengths[-1] if self._lengths else 0

    def free_extents(self) -> list[tuple[int, int]]:
        """`(offset, length)` of every free extent, by offset."""
        return sorted(self._length_at.items())

    def _give_back(self, start: int, end: int) -> None:
        if start < 0 or end > self.capacity_bytes or start % ALIGN_BYTES:
            raise InvariantError(f"extent [{start}, {end}) was never given out")
        left = self._start_at.get(start)
        if left is not None:
            self._remove(left, start - left)
            start = left
        right = self._length_at.get(end)
        if right is not None:
            self._remove(end, right)
            end += right
        self._insert(start, end - start)

    def _insert(self, start: int, length: int) -> None:
        if start in self._length_at or start + length in self._start_at:
            raise InvariantError(f"extent [{start}, {start + length}) was freed twice")
        self._length_at[start] = length
        self._start_at[start + length] = start
        starts = self._by_length.get(length)
        if starts is None:
            starts = self._by_length[length] = {}
            insort(self._lengths, length)
        starts[start] = None
        self.free_bytes += length

    def _remove(self, start: int, length: int) -> None:
        del self._length_at[start]
        del self._start_at[start + length]
        starts = self._by_length[length]
        del starts[start]
        if not starts:
            del self._by_length[length]
            del self._lengths[bisect_left(self._lengths, length)]
        self.free_bytes -= length

    def check_invariants(self) -> None:
        """Raises InvariantError unless all views of the free space agree."""
        end = -1
        total = 0
        for start, length in self.free_extents():
            if start <= end:
                raise InvariantError(f"free extents overlap or touch uncoalesced at {start}")
            if start % ALIGN_BYTES or length % ALIGN_BYTES or length <= 0:
                raise InvariantError(f"free extent ({start}, {length}) is misaligned")
            end = start + length
            total += length
            if self._start_at.get(end) != start or start not in self._by_length.get(length, {}):
                raise InvariantError(f"free extent ({start}, {length}) is not in every view")
        if end > self.capacity_bytes or total != self.free_bytes:
            raise InvariantError(f"{total} bytes free by extent, {self.free_bytes} by count")
        if len(self._start_at) != len(self._length_at) or self._lengths != sorted(self._by_length):
            raise InvariantError("free extent views have entries left over")

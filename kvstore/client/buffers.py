"""Memory for blocks that came from, or go to, a daemon elsewhere."""

from __future__ import annotations

import mmap
import threading
from collections import defaultdict

SMALLEST_BYTES = 1 << 20
KEPT_BYTES = 1 << 30  # that nobody uses; memory that is there already is filled much faster


class Buffers:
    """Gives out memory and takes it back, to be given out again. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: defaultdict[int, list[memoryview]] = defaultdict(list)
        self._free_bytes = 0

    def take(self, nbytes: int) -> memoryview:
        """At least `nbytes`, and less than twice that; what is in it is anything."""
        size = _size(nbytes)
        with self._lock:
            if self._free[size]:
                self._free_bytes -= size
                return self._free[size].pop()
        memory = mmap.mmap(-1, size)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(memory)

    def give(self, buffer: memoryview) -> None:
        """One from `take`, as a whole, of which no view is used any more."""
        with self._lock:
            if self._free_bytes + len(buffer) <= KEPT_BYTES:
                self._free_bytes += len(buffer)
                self._free[len(buffer)].append(buffer)


def _size(nbytes: int) -> int:
    return max(SMALLEST_BYTES, 1 << (nbytes - 1).bit_length())

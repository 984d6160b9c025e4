"""The memory of the RAM tier: one memfd, mapped once, in huge pages where the kernel has them.

Two things are bought by huge pages. A drive is handed a 2 MiB block as one piece and not
as 512, and the first write to memory costs one page fault and not 512. They do not depend
on how the machine is set up (shared memory seldom is): MADV_COLLAPSE, of Linux 6.1, makes
them whatever the settings say.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

from kvstore.tiers.driver import address

HUGE_PAGE_BYTES = 2 << 20
# Made huge in one go: a millisecond, where the memory has been used before.
STEP_BYTES = 16 << 20

_MADV_COLLAPSE = 25
_TRIES = 3

# mmap.madvise would hold the GIL.
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Arena:
    """`length` bytes that no other process sees, gone with the last one that has them.

    Memory is taken only where `populate` has been; beyond, page by page as it is
    first touched. `buffer` is all of it, and the arena's.
    """

    def __init__(self, length: int) -> None:
        """Raises OSError when the memory is refused."""
        fd = os.memfd_create("kvstore-ram", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, length + HUGE_PAGE_BYTES)
            self._map = _map_congruent(fd, length)
        finally:
            os.close(fd)  # mmap keeps a descriptor of its own
        self.buffer = memoryview(self._map)
        start = address(self.buffer)
        self._populated = -start % HUGE_PAGE_BYTES  # up to here, from the first boundary on
        self._start = start

    def populate(self, stop: int) -> None:
        """See to it that `[0, stop)` is memory, before someone writes to it. Any thread may."""
        while (begin := self._populated) < stop:
            length = min(STEP_BYTES, (len(self.buffer) - begin) & -HUGE_PAGE_BYTES)
            end = begin + length
            for place in range(begin, end, HUGE_PAGE_BYTES):
                self.buffer[place]  # a page there is to be, or there is nothing to collapse
            if length:
                # Where it is refused, small pages come as they are touched.
                _madvise(self._start + begin, length, _MADV_COLLAPSE)
            self._populated = max(end, self._populated) if length else len(self.buffer)

    def close(self) -> None:
        """Unmap. With views of it still held it goes when the last of them does."""
        self.buffer.release()
        with contextlib.suppress(BufferError):
            self._map.close()
        del self._map


def _map_congruent(fd: int, length: int) -> mmap.mmap:
    """Map `length` bytes of a file that is a huge page longer, so that huge pages fit.

    They do where address and offset in the file agree modulo their size. The address is
    the kernel's choice; it is the same again when the same length is mapped into the hole
    that was just left, unless another thread was faster.
    """
    mapped = mmap.mmap(fd, length)
    for _ in range(_TRIES):
        offset = address(memoryview(mapped)) % HUGE_PAGE_BYTES
        mapped.close()
        mapped = mmap.mmap(fd, length, offset=offset)
        if address(memoryview(mapped)) % HUGE_PAGE_BYTES == offset:
            break
    return mapped

"""Shared memory in this process's address space, where huge pages fit and nobody is left hanging.

Two processes that map the same file each need their part of the address space to begin at a
multiple of a huge page, or its pages stay small; `mmap` of the standard library cannot ask
for that. MADV_COLLAPSE, of Linux 6.1, makes them huge whatever the machine's settings say.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

HUGE_PAGE_BYTES = 2 << 20
# Made huge in one go: a millisecond, where the memory has been used before.
STEP_BYTES = 16 << 20

_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_MADV_COLLAPSE = 25
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_munmap = _libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

# mmap.madvise would hold the GIL.
_madvise = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def map_shared(fd: int, length: int) -> memoryview:
    """The first `length` bytes of a file, writable and shared, from a huge page's boundary on.

    The descriptor may be closed. Unmapped when the last view of it is gone, so that no view
    ever points to nothing. Raises OSError.
    """
    mapped_bytes = -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
    room = mapped_bytes + HUGE_PAGE_BYTES
    hole = _map(None, room, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANON | _MAP_NORESERVE, -1)
    start = -(-hole // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = start + mapped_bytes
    try:
        access = mmap.PROT_READ | mmap.PROT_WRITE
        _map(start, mapped_bytes, access, mmap.MAP_SHARED | _MAP_FIXED, fd)
    except OSError:
        _munmap(hole, room)
        raise
    for first, last in ((hole, start), (end, hole + room)):
        if first < last:
            _munmap(first, last - first)
    memory = (ctypes.c_char * length).from_address(start)
    ending = weakref.finalize(memory, _munmap, start, mapped_bytes)
    ending.atexit = False  # the process's end does it, after its last thread
    return memoryview(memory).cast("B")


def make_huge(memory: memoryview, begin: int, end: int) -> None:
    """See to it that `[begin, end)` of a mapping is memory, in huge pages where they can be had.

    Both are multiples of a huge page, or the end of the mapping, whose last part stays small.
    """
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for first in range(begin, end, STEP_BYTES):
        length = (min(first + STEP_BYTES, end) - first) & -HUGE_PAGE_BYTES
        for place in range(first, first + length, HUGE_PAGE_BYTES):
            memory[place]  # a page there is to be, or there is nothing to collapse
        if length:
            # Where it is refused, small pages come as they are touched.
            _madvise(start + first, length, _MADV_COLLAPSE)


def _map(address: int | None, length: int, access: int, flags: int, fd: int) -> int:
    mapped = _mmap(address, length, access, flags, fd, 0)
    if mapped is None or mapped == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(mapped)

"""Host memory that the device reads and writes by itself: pinned, and known to the driver.

A RAM arena is pinned once by each process that maps it, its owner or a daemon's client. It is
found by what the views of blocks are views of, so whoever hands out views knows nothing of it.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from threading import Lock, Thread

import torch

log = logging.getLogger(__name__)

_PORTABLE = 1  # for all CUDA contexts of the process


def _register(start: int, nbytes: int, device: torch.device) -> int:
    # CuPy's, because it clears CUDA's last error; torch would raise it somewhere else later.
    from cupy.cuda import runtime

    try:
        # A thread's device is the first one until it says otherwise, which may not be ours.
        with torch.cuda.device(device):
            runtime.hostRegister(start, nbytes, _PORTABLE)
    except runtime.CUDARuntimeError as error:
        return int(error.status)
    return 0


def _unregister(start: int, device: torch.device) -> int:
    from cupy.cuda import runtime

    try:
        with torch.cuda.device(device):
            runtime.hostUnregister(start)
    except runtime.CUDARuntimeError as error:
        return int(error.status)
    return 0


def _aside(work: Callable[[], object]) -> None:
    # Not a daemon thread: a process does not end within a call of CUDA.
    Thread(target=work, name="kvstore-pin").start()


class PinnedMemory:
    """What this process has registered with CUDA. Any thread may call it.

    Only memory that ctypes made an object of, as `kvstore.mapping` does, can be pinned: it
    says when it is about to be unmapped. What somebody else has registered is not counted,
    because they may end that at any time.
    """

    def __init__(
        self,
        register: Callable[[int, int, torch.device], int] = _register,
        unregister: Callable[[int, torch.device], int] = _unregister,
        aside: Callable[[Callable[[], object]], object] = _aside,
    ) -> None:
        """The first two take an address, bytes, and a device; they return 0, or CUDA's error.

        `aside` does what it is given while its caller goes on.
        """
        self._register = register
        self._unregister = unregister
        self._aside = aside
        # CUDA lets other threads run while it pins. Finalizers run anywhere, so they take no lock.
        self._registering = Lock()
        self._known: dict[int, bool] = {}  # by id of the object, while it lives: is it pinned?

    def pin(self, memory: memoryview, device: torch.device) -> bool:
        """Whether `device` can reach what `memory` is a view of, which is pinned first.

        Blocks until it is: a second for some GiB. What was refused is tried again.
        """
        return self._pin(memory.obj, device)

    def holds(self, views: Iterable[memoryview], device: torch.device) -> bool:
        """Whether `device` can reach all of `views` by now. Does not block.

        Memory that it meets for the first time is pinned meanwhile. What is refused is said
        once, and stays as it is.
        """
        return all(self._is_pinned(view.obj, device) for view in views)

    def _is_pinned(self, owner: object, device: torch.device) -> bool:
        is_pinned = self._known.get(id(owner))
        if is_pinned is None and isinstance(owner, ctypes.Array):
            self._meet(owner)
            self._aside(partial(self._pin, owner, device))
            is_pinned = self._known[id(owner)]
        return bool(is_pinned)

    def _pin(self, owner: object, device: torch.device) -> bool:
        if not isinstance(owner, ctypes.Array):
            return False
        self._meet(owner)
        with self._registering:
            if not self._known[id(owner)]:  # another thread may have been faster
                self._known[id(owner)] = self._is_registered(owner, device)
            return self._known[id(owner)]

    def _meet(self, owner: ctypes.Array[ctypes.c_char]) -> None:
        if id(owner) not in self._known:
            _before_unmapping(owner, self._known.pop, id(owner), None)
            self._known.setdefault(id(owner), False)

    def _is_registered(self, owner: ctypes.Array[ctypes.c_char], device: torch.device) -> bool:
        start, nbytes = ctypes.addressof(owner), ctypes.sizeof(owner)
        error = self._register(start, nbytes, device)
        if error:
            log.warning(
                "CUDA does not pin %d bytes of the cache (error %d): blocks are copied by way "
                "of other memory, which is slower",
                nbytes,
                error,
            )
            return False
        _before_unmapping(owner, self._unregister, start, device)
        return True


def _before_unmapping(
    owner: ctypes.Array[ctypes.c_char], end: Callable[..., object], *args: object
) -> None:
    """Finalizers run from the latest to the first, and the first is the one that unmaps."""
    ending = weakref.finalize(owner, end, *args)
    ending.atexit = False  # the driver forgets all at the process's end


# A process registers its memory once, however many engines it has.
PINNED = PinnedMemory()

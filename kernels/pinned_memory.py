"""Host memory that the device reads and writes by itself: pinned, and known to the driver.

A RAM arena is pinned once by each process that maps it, its owner or a daemon's client. It is
found by what the views of blocks are views of, so whoever hands out views knows nothing of it.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable, Iterable

log = logging.getLogger(__name__)

_PORTABLE = 1  # for all CUDA contexts of the process
_ALREADY_REGISTERED = 712  # by somebody else, who will see to its end


def _register(start: int, nbytes: int) -> int:
    # CuPy's, because it clears CUDA's last error; torch would raise it somewhere else later.
    from cupy.cuda import runtime

    try:
        runtime.hostRegister(start, nbytes, _PORTABLE)
    except runtime.CUDARuntimeError as error:
        return int(error.status)
    return 0


def _unregister(start: int) -> int:
    from cupy.cuda import runtime

    try:
        runtime.hostUnregister(start)
    except runtime.CUDARuntimeError as error:
        return int(error.status)
    return 0


class PinnedMemory:
    """What this process has registered with CUDA. Belongs to one thread.

    Only memory that ctypes made an object of, as `kvstore.mapping` does, can be pinned: it
    says when it is about to be unmapped.
    """

    def __init__(
        self,
        register: Callable[[int, int], int] = _register,
        unregister: Callable[[int], int] = _unregister,
    ) -> None:
        """The functions take an address, and bytes; they return 0, or CUDA's error."""
        self._register = register
        self._unregister = unregister
        self._known: dict[int, bool] = {}  # by id of the object, while it lives: is it pinned?

    def holds(self, views: Iterable[memoryview]) -> bool:
        """Whether the device can reach all of `views`; pins the memory that they lie in first.

        That takes a second for some GiB; it is done once. What is refused is said once, and
        stays as it is.
        """
        known = self._known
        return all(
            pinned if (pinned := known.get(id(view.obj))) is not None else self._pin(view.obj)
            for view in views
        )

    def _pin(self, owner: object) -> bool:
        if not isinstance(owner, ctypes.Array):
            return False
        start, nbytes = ctypes.addressof(owner), ctypes.sizeof(owner)
        error = self._register(start, nbytes)
        is_pinned = error in (0, _ALREADY_REGISTERED)
        if not is_pinned:
            log.warning(
                "CUDA does not pin %d bytes of the cache (error %d): blocks are copied by way "
                "of other memory, which is slower",
                nbytes,
                error,
            )
        self._known[id(owner)] = is_pinned
        ending = weakref.finalize(owner, self._forget, id(owner), None if error else start)
        ending.atexit = False  # the driver forgets all at the process's end
        return is_pinned

    def _forget(self, number: int, start: int | None) -> None:
        """Called before the memory is unmapped: finalizers run from the latest to the first."""
        del self._known[number]
        if start is not None:
            self._unregister(start)


# A process registers its memory once, however many engines it has.
PINNED = PinnedMemory()

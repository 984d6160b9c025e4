"""The memory of the RAM tier: one memfd, mapped once, in huge pages where the kernel has them.

Two things are bought by huge pages. A drive is handed a 2 MiB block as one piece and not
as 512, and the first write to memory costs one page fault and not 512. They do not depend
on how the machine is set up (`kvstore.mapping`).
"""

from __future__ import annotations

import fcntl
import os

from kvstore.mapping import HUGE_PAGE_BYTES, STEP_BYTES, make_huge, map_shared


class Arena:
    """`length` bytes of shared memory, gone with the last process that has them.

    Memory is taken only where `populate` has been; beyond, page by page as it is
    first touched. `buffer` is all of it, and the arena's. Another process that is sent
    the descriptor `fd`, which is the arena's, can map it as well (`map_shared`).
    """

    def __init__(self, length: int) -> None:
        """Raises OSError when the memory is refused."""
        self.fd = os.memfd_create("kvstore-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, -(-length // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES)
            # Who has the descriptor can write to the memory, but not take it away under us.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self.buffer = map_shared(self.fd, length)
        except BaseException:
            os.close(self.fd)
            raise
        self._populated = 0  # up to here

    def is_populated(self, stop: int) -> bool:
        """Whether `populate` would have nothing to do."""
        return self._populated >= stop

    def populate(self, stop: int) -> None:
        """See to it that `[0, stop)` is memory, before someone writes to it. Any thread may."""
        while (begin := self._populated) < stop:
            length = min(STEP_BYTES, (len(self.buffer) - begin) & -HUGE_PAGE_BYTES)
            end = begin + length
            make_huge(self.buffer, begin, end)
            self._populated = max(end, self._populated) if length else len(self.buffer)

    def close(self) -> None:
        """Unmap. With views of it still held it goes when the last of them does."""
        self.buffer.release()
        os.close(self.fd)

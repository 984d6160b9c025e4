"""Blocks of the daemon's arena, pinned for this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from types import TracebackType
from typing import Any, Self
from weakref import ref

from kvstore import wire
from kvstore.client.link import Link, tiers
from kvstore.errors import ClosedError, WireError
from kvstore.tier import Miss

# How much later than its deadline a lease may hear of it from a daemon that works.
GRACE_S = 0.25


class ClientLease:
    """See `verbs.Lease`. Its bytes are the daemon's memory itself; nothing is copied.

    Where the daemon is lost, what is ready stays readable until release, and what is not
    is a miss.
    """

    def __init__(
        self, link: Link, block_bytes: int, leased: wire.Leased, deadline_s: float
    ) -> None:
        """`turn` of the link's connection is held; `deadline_s` by this process's monotonic.

        Raises WireError.
        """
        self._is_held = False  # an empty lease is nothing to the daemon
        self._link = link
        self._block_bytes = block_bytes
        self._number = leased.lease
        self._sources = tiers(leased.sources)
        self._blocks = len(leased.sources)
        self._miss = _miss(leased.miss)
        self._deadline_s = deadline_s
        self._places: list[slice] = []  # in the arena, of the blocks that are ready
        self._views: list[memoryview] = []  # of those that were asked for
        self._is_cut = False  # nothing more comes
        self._released = False
        self._more(leased.offsets, self._blocks)
        if self._blocks:
            self._is_held = True
            link.leases[self._number] = ref(self)

    def __len__(self) -> int:
        return self._blocks

    @property
    def miss(self) -> Miss | None:
        return self._miss

    @property
    def sources(self) -> list[str]:
        return [source or "" for source in self._sources[: self._blocks]]

    def ready(self) -> int:
        if len(self._places) < self._blocks:
            self._link.connection.drain()
            self._cut_if_over()
        return len(self._places)

    def wait(self, n: int | None = None, timeout_s: float | None = None) -> int:
        if len(self._places) >= self._blocks:
            return len(self._places)
        give_up_s = self._deadline_s + GRACE_S
        if timeout_s is not None:
            give_up_s = min(give_up_s, time.monotonic() + timeout_s)
        self._link.connection.wait(
            lambda: len(self._places) >= (self._blocks if n is None else min(n, self._blocks)),
            give_up_s,
        )
        self._cut_if_over()
        return len(self._places)

    def __await__(self) -> Generator[Any, None, int]:
        return asyncio.to_thread(self.wait).__await__()

    @property
    def views(self) -> list[memoryview]:
        """Read-only; owned by the daemon's arena. Raises ClosedError after release.

        Keep the lease as long as its views: a lost one is released by the next verb.
        """
        ready = self.ready()
        if self._released:
            raise ClosedError("the lease was released; its blocks may no longer be read")
        # Replaced as a whole: two threads may make the same views, but never a wrong list.
        views, memory = self._views, self._link.readable
        if len(views) < ready:
            more = [memory[place] for place in self._places[len(views) : ready]]
            views = self._views = views + more
        return views[:ready]

    def release(self) -> None:
        with self._link.connection.turn:
            if self._released:
                return
            self._released = True
            self._views = []
            if len(self._places) < self._blocks:
                # The owner did not want to wait any longer: to it, the tier was too slow.
                self._cut_locked(Miss.TOO_SLOW)
                self._link.connection.wake_locked()
        if self._is_held:
            self._link.let_go(wire.Release(self._number))

    def progress_locked(self, progress: wire.Progress) -> None:
        """The daemon says what has become ready, and where the lease ends now.

        Raises WireError.
        """
        if self._is_cut:
            return
        if progress.blocks > self._blocks:
            raise WireError("the daemon makes a lease longer")
        self._more(progress.offsets, progress.blocks)
        self._blocks = progress.blocks
        self._miss = _miss(progress.miss)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __del__(self) -> None:
        # The collector may run while this very thread holds `turn`: only leave word.
        if self._is_held and not self._released:
            self._link.abandoned.append(wire.Release(self._number))

    def _more(self, offsets: bytes, blocks: int) -> None:
        """Blocks have become ready, of `blocks` at most."""
        places = self._places + self._link.places(offsets, self._block_bytes)
        if len(places) > blocks:
            raise WireError("the daemon has more blocks ready than are leased")
        self._places = places

    def _cut_locked(self, miss: Miss) -> None:
        self._is_cut = True
        self._blocks, self._miss = len(self._places), miss

    def _cut_if_over(self) -> None:
        """What has not come, and will not: the daemon is lost, or late beyond all deadlines."""
        link = self._link
        with link.connection.turn:
            if len(self._places) >= self._blocks:
                return
            if link.is_lost:
                self._cut_locked(Miss.BREAKER)
            elif time.monotonic() >= self._deadline_s + GRACE_S:
                self._cut_locked(Miss.DEADLINE)


class NoLease:
    """What an acquire gives while the daemon is away: nothing, at once."""

    miss = Miss.BREAKER

    def __len__(self) -> int:
        return 0

    @property
    def sources(self) -> list[str]:
        return []

    @property
    def views(self) -> list[memoryview]:
        return []

    def ready(self) -> int:
        return 0

    def wait(self, n: int | None = None, timeout_s: float | None = None) -> int:
        return 0

    async def _wait(self) -> int:
        return 0

    def __await__(self) -> Generator[Any, None, int]:
        return self._wait().__await__()

    def release(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


def _miss(value: str | None) -> Miss | None:
    """A reason that only a newer daemon knows is a miss all the same."""
    if value is None:
        return None
    try:
        return Miss(value)
    except ValueError:
        return Miss.ABSENT

"""Blocks of a daemon, some of them perhaps still on their way."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Generator
from types import TracebackType
from typing import Any, Self
from weakref import ref

from kvstore import wire
from kvstore.client.link import Link, tiers
from kvstore.errors import ClosedError, WireError
from kvstore.tier import Miss


class ClientLease(ABC):
    """See `verbs.Lease`. What is ready is readable until release, also when the daemon is lost.

    What is not ready then is a miss.
    """

    _is_held = False  # an empty lease is nothing to the daemon
    _released = False

    def __init__(self, link: Link, leased: wire.Leased, deadline_s: float) -> None:
        """As `Link.lease`."""
        self._link = link
        self._number = leased.lease
        self._sources = tiers(leased.sources)
        self._blocks = len(leased.sources)
        self._ready = 0
        self._miss = _miss(leased.miss)
        self._deadline_s = deadline_s
        self._views: list[memoryview] = []  # of those that were asked for
        self._is_cut = False  # nothing more comes
        if self._blocks:
            self._is_held = True
            link.leases[self._number] = ref(self)

    @abstractmethod
    def _views_of(self, start: int, stop: int) -> list[memoryview]:
        """Of blocks that are ready."""

    def __len__(self) -> int:
        return self._blocks

    @property
    def miss(self) -> Miss | None:
        return self._miss

    @property
    def sources(self) -> list[str]:
        return [source or "" for source in self._sources[: self._blocks]]

    def ready(self) -> int:
        if self._ready < self._blocks:
            self._link.connection.drain()
            self._cut_if_over()
        return self._ready

    def wait(self, n: int | None = None, timeout_s: float | None = None) -> int:
        if self._ready >= self._blocks:
            return self._ready
        give_up_s = self._deadline_s + self._link.grace_s
        if timeout_s is not None:
            give_up_s = min(give_up_s, time.monotonic() + timeout_s)
        self._link.connection.wait(
            lambda: self._ready >= (self._blocks if n is None else min(n, self._blocks)),
            give_up_s,
        )
        self._cut_if_over()
        return self._ready

    def __await__(self) -> Generator[Any, None, int]:
        return asyncio.to_thread(self.wait).__await__()

    @property
    def views(self) -> list[memoryview]:
        """Read-only. Raises ClosedError after release.

        Keep the lease as long as its views: a lost one is released by the next verb.
        """
        ready = self.ready()
        if self._released:
            raise ClosedError("the lease was released; its blocks may no longer be read")
        # Replaced as a whole: two threads may make the same views, but never a wrong list.
        views = self._views
        if len(views) < ready:
            views = self._views = views + self._views_of(len(views), ready)
        return views[:ready]

    def release(self) -> None:
        with self._link.connection.turn:
            if self._released:
                return
            self._released = True
            self._views = []
            if self._ready < self._blocks:
                # The owner did not want to wait any longer: to it, the tier was too slow.
                self._cut_locked(Miss.TOO_SLOW)
                self._link.connection.wake_locked()
        if self._is_held:
            self._link.let_go(wire.Release(self._number))

    def progress_locked(self, progress: wire.Progress) -> None:
        """The daemon says what has become ready, and where the lease ends now.

        Raises WireError.
        """
        if not self._is_cut:
            if not self._ready <= progress.blocks <= self._blocks:
                raise WireError("the daemon makes a lease longer, or takes back what was ready")
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

    def _cut_locked(self, miss: Miss) -> None:
        self._is_cut = True
        self._blocks, self._miss = self._ready, miss

    def _cut_if_over(self) -> None:
        """What has not come, and will not: the daemon is lost, or late beyond all deadlines."""
        link = self._link
        with link.connection.turn:
            if self._ready >= self._blocks:
                return
            if link.is_lost:
                self._cut_locked(Miss.BREAKER)
            elif time.monotonic() >= self._deadline_s + link.grace_s:
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

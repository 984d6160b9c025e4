"""Pinned readable blocks, some of them perhaps still on their way."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Generator
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kvstore.answers import RAM
from kvstore.errors import ClosedError
from kvstore.hashing import Chain, Key
from kvstore.hub import Hub
from kvstore.policy import Rows
from kvstore.tier import Miss

PENDING = -1


class Fill:
    """One block on its way into RAM, for all who asked for it. Guarded by the hub's lock."""

    __slots__ = ("done", "key", "miss", "namespace", "parent", "row", "source", "waiters")

    def __init__(self, namespace: bytes, key: Key, parent: Key, row: int, source: str) -> None:
        self.namespace = namespace  # fingerprint
        self.key = key
        self.parent = parent
        self.row = row
        self.source = source
        self.waiters = 0  # leases that pin the block once it has come
        self.done = False
        self.miss: Miss | None = None  # why it did not come


class Lease:
    """The longest present prefix of a chain, pinned until `release`.

    Blocks become ready in order. The lease ends early, and says why in `miss`,
    where a block turns out not to be there or does not come before the deadline;
    `len(lease)` is then less than before. Safe to use from several threads.
    Release it, or use it as a context manager; after that its views must not
    be touched, for the bytes under them may become another block.
    """

    def __init__(
        self,
        hub: Hub,
        chain: Chain,
        rows: Rows,
        fills: list[tuple[int, Fill]],
        deadline_s: float,
        miss: Miss | None,
    ) -> None:
        """`rows`, owned by the lease, are pinned, or PENDING where `fills` has `(position, fill)`.

        Lock held.
        """
        self._hub = hub
        self._chain = chain
        self._rows = rows
        self._pending = deque(fills)
        self._sources = [RAM] * len(rows)
        for position, fill in fills:
            fill.waiters += 1
            self._sources[position] = fill.source
        self._deadline_s = deadline_s
        self._views: list[memoryview] = []
        self._miss = miss
        self._released = False

    def __len__(self) -> int:
        """Blocks served or still on their way."""
        return len(self._rows)

    @property
    def miss(self) -> Miss | None:
        """Why the block after the last one is not served; None if the whole chain is."""
        return self._miss

    @property
    def sources(self) -> list[str]:
        """For each block the tier it comes from: "ram" or "nvme"."""
        return self._sources[: len(self._rows)]

    def ready(self) -> int:
        """How many leading blocks can be read now. Does not block."""
        if not self._pending:
            return len(self._rows)
        with self._hub.lock:
            return self._ready_locked()

    def wait(self, n: int | None = None, timeout_s: float | None = None) -> int:
        """Block until `n` (default: all) leading blocks are ready, or the lease ends before.

        Returns how many are ready. Gives up after `timeout_s`, and at the lease's
        deadline, when what has not come is cut off.
        """
        if not self._pending:
            return len(self._rows)
        hub = self._hub
        give_up_s = self._deadline_s
        if timeout_s is not None:
            give_up_s = min(give_up_s, hub.clock.monotonic_s() + timeout_s)
        with hub.lock:
            while True:
                ready = self._ready_locked()
                wanted = len(self._rows) if n is None else min(n, len(self._rows))
                left_s = give_up_s - hub.clock.monotonic_s()
                if ready >= wanted or left_s <= 0:
                    return ready
                hub.changed.wait(min(left_s, threading.TIMEOUT_MAX))

    def __await__(self) -> Generator[Any, None, int]:
        return self._wait().__await__()

    async def _wait(self) -> int:
        """As `wait` for all blocks, without holding up the event loop."""
        hub, loop, changed = self._hub, asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(changed.set)

        with hub.lock:
            hub.listeners.add(wake)
        try:
            while True:
                changed.clear()
                ready = self.ready()
                if ready >= len(self._rows):
                    return ready
                left_s = self._deadline_s - hub.clock.monotonic_s()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), left_s)
        finally:
            with hub.lock:
                hub.listeners.discard(wake)

    @property
    def views(self) -> list[memoryview]:
        """Read-only bytes of the ready blocks, canonical layout; owned by the store.

        Keep the lease as long as its views: a lost one is released by the next verb.
        """
        ready = self.ready()
        if self._released or self._hub.closed:
            raise ClosedError("the lease was released; its blocks may no longer be read")
        # Replaced as a whole: two threads may make the same views, but never a wrong list.
        views = self._views
        if len(views) < ready:
            views = self._views = views + self._hub.readables(self._rows[len(views) : ready])
        return views[:ready]

    def offsets(self, start: int, stop: int) -> NDArray[np.int64]:
        """Where in the arena blocks `[start, stop)` begin, all of which are ready."""
        return self._hub.slots.index.offset[self._rows[start:stop]]

    def left_s(self) -> float:
        """Until the deadline; negative after it."""
        return self._deadline_s - self._hub.clock.monotonic_s()

    def release(self) -> None:
        """Give the pins back and count what was served. May be called twice."""
        hub = self._hub
        with hub.lock:
            if self._released or hub.closed:
                self._released = True
                return
            if self._ready_locked() < len(self._rows):
                # The owner did not want to wait any longer: to it, the tier was too slow.
                self.cut_locked(self._pending[0][0], Miss.TOO_SLOW)
                hub.notify_locked()
            self._released = True
            hub.slots.unpin(self._rows, hub.clock.wall_s())
            if self._sources.count(RAM) == len(self._sources):
                hub.hits[RAM] += len(self._rows)
            else:
                hub.hits.update(self._sources)
            block_bytes = self._chain.namespace.layout.block_bytes
            hub.counters["served_bytes"] += len(self._rows) * block_bytes
            if self._miss is not None:
                hub.misses[self._miss.value] += len(self._chain) - len(self._rows)
        self._views = []
        hub.used.append(self._chain.keys[: len(self._rows)])

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
        if not self._released:
            lost = Lease.__new__(Lease)
            lost.__dict__.update(self.__dict__)
            self._released = True
            self._hub.orphans.append(lost.release)

    def _ready_locked(self) -> int:
        while self._pending and self._pending[0][1].done:
            position, fill = self._pending[0]
            if fill.miss is not None:
                self.cut_locked(position, fill.miss)
            else:
                self._rows[position] = fill.row
                self._pending.popleft()
        if self._pending and self._hub.clock.monotonic_s() >= self._deadline_s:
            self.cut_locked(self._pending[0][0], Miss.DEADLINE)
        return self._pending[0][0] if self._pending else len(self._rows)

    def cut_locked(self, position: int, miss: Miss) -> None:
        """End the lease before block `position`; lock held."""
        for i, fill in self._pending:
            if i < position:
                continue
            if not fill.done:
                fill.waiters -= 1
            elif fill.miss is None:
                self._rows[i] = fill.row
        cut = self._rows[position:]
        self._miss = miss
        self._rows = self._rows[:position]
        del self._sources[position:]
        self._views = self._views[:position]
        # After the rows: once nothing is pending, all of them are read without the lock.
        self._pending = deque(item for item in self._pending if item[0] < position)
        self._hub.slots.unpin(cut[cut != PENDING], self._hub.clock.wall_s())

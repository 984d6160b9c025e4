"""Writable slots that nobody can find until they are committed."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import ClosedError
from kvstore.hashing import Chain, Key
from kvstore.hub import Hub
from kvstore.policy import Rows
from kvstore.retention import DEFAULT_PRIORITY, Retention


class Reservation:
    """Slots for those blocks of a chain that were not held and for which there was room.

    Fill `views`, then `commit`. Two writers of one key do not wait for each
    other: the first commit wins, the second copy is dropped, neither fails. As
    a context manager, or when its owner is lost, what was not committed is
    aborted. Belongs to one thread.
    """

    def __init__(
        self,
        hub: Hub,
        chain: Chain,
        indices: list[int],
        rows: Rows,
        retention: Retention,
        committed: Callable[[list[int]], None],
    ) -> None:
        """`rows[i]`, reserved, is for block `chain.keys[indices[i]]`.

        `committed` is told, with the lock held, the rows that became resident.
        """
        self._hub = hub
        self._chain = chain
        self._rows = rows
        self._retention = retention
        self._committed = committed
        self._open = True
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def keys(self) -> list[Key]:
        """Of the blocks that the slots are for."""
        return [self._chain.keys[i] for i in self.indices]

    @property
    def block_bytes(self) -> int:
        return self._chain.namespace.layout.block_bytes

    @property
    def views(self) -> list[memoryview]:
        """Writable bytes of each reserved block, canonical layout; owned by the store.

        Not to be touched after `commit` or `abort`.
        """
        self._check_open()
        return self._hub.writables(self._rows)

    def offsets(self) -> NDArray[np.int64]:
        """Where in the arena each slot begins: for a process that has it mapped."""
        self._check_open()
        return self._hub.slots.index.offset[self._rows]

    @property
    def is_populated(self) -> bool:
        """Whether all slots are memory already, so that `views` are there at once."""
        return self._hub.ram.arena.is_populated(self.stop())

    def populate(self) -> None:
        """See to it that the slots are memory. Blocks for seconds, where they are many."""
        self._hub.ram.populate(self.stop())

    def stop(self) -> int:
        """Where in the arena the last of the slots ends."""
        index = self._hub.slots.index
        return int((index.offset[self._rows] + index.nbytes[self._rows]).max(initial=0))

    def commit(self) -> int:
        """Make the blocks visible; returns how many this writer was the first to commit.

        Raises ClosedError when committed or aborted before, or the store is closed.
        """
        hub, chain = self._hub, self._chain
        keys = self.keys
        parents = [chain.keys[i - 1] if i else chain.parent for i in self.indices]
        self._check_open()
        sums = hub.sums(self._rows.tolist()) if hub.bounds.verify == "always" else {}
        with hub.lock:
            self._check_open()
            self._open = False
            hub.checksums.update(sums)
            won: list[int] = []
            for part, priority, ttl_s in self._parts_locked():
                rows = self._rows[part]
                mine = hub.publish_locked(
                    rows, chain.namespace, keys[part], parents[part], priority, ttl_s
                )
                won += rows.tolist() if all(mine) else rows[np.array(mine)].tolist()
                if ttl_s:
                    self._start_clocks_locked(won)
            hub.counters["committed_blocks"] += len(won)
            block_bytes = chain.namespace.layout.block_bytes
            hub.counters["committed_bytes"] += len(won) * block_bytes
            hub.counters["duplicate_blocks"] += len(keys) - len(won)
            self._committed(won)
        return len(won)

    def abort(self) -> None:
        """Give the slots back, unseen. May be called twice, and after `commit`."""
        with self._hub.lock:
            if self._open and not self._hub.closed:
                self._hub.slots.free(self._rows)
            self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()

    def __del__(self) -> None:
        if self._open:
            lost = Reservation.__new__(Reservation)
            lost.__dict__.update(self.__dict__)
            self._open = False
            self._hub.orphans.append(lost.abort)

    def _check_open(self) -> None:
        self._hub.check_open()
        if not self._open:
            raise ClosedError("the reservation was committed or aborted before")

    def _parts_locked(self) -> list[tuple[slice, int, float]]:
        """Which blocks get which priority and TTL; what was asked, as far as the budget goes."""
        hub, asked = self._hub, self._retention
        sizes = hub.slots.index.nbytes[self._rows].tolist()
        raised = hub.allowed_locked(self._chain.namespace.fingerprint, asked.priority, sizes)
        ttl_s = min(asked.ttl_s or 0.0, hub.bounds.ttl_max_s)
        parts = [
            (slice(0, raised), asked.priority, ttl_s),
            (slice(raised, len(sizes)), DEFAULT_PRIORITY, 0.0),
        ]
        return [part for part in parts if part[0].start < part[0].stop]

    def _start_clocks_locked(self, rows: list[int]) -> None:
        """A commit is a release: nobody holds the blocks any more."""
        array = np.array(rows, dtype=np.int64)
        self._hub.slots.pin(array)
        self._hub.slots.unpin(array, self._hub.clock.wall_s())

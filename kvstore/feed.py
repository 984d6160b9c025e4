"""The events of a store: recorded where they become true, read by whoever follows."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from kvstore.errors import ClosedError, FallenBehindError
from kvstore.events import (
    Cleared,
    Contents,
    Event,
    EventLog,
    Numbered,
    Removed,
    Snapshot,
    Stored,
    apply,
)
from kvstore.hashing import Key
from kvstore.slots import SlotTable

KEPT_BLOCKS = 65_536  # a few MB of keys; a reader that is further behind takes a snapshot
PAGE_ROWS = 2048  # of a table, looked at under its lock at once
_ATTEMPTS = 5


class Table(Protocol):
    """A tier, as far as its events go."""

    @property
    def name(self) -> str: ...

    @property
    def slots(self) -> SlotTable: ...

    @property
    def lock(self) -> threading.Lock: ...


class Feed:
    """What happens in a store's tiers, from `start` on. Safe from any thread.

    An event is recorded under the lock of its tier, the moment it is true. Before `start`
    that costs nothing, and there is nothing to read.
    """

    def __init__(self, tiers: Sequence[Table]) -> None:
        """The tiers are borrowed."""
        self._tiers = tiers
        self._lock = threading.Lock()  # taken last, held for a moment
        self._log: EventLog | None = None
        self._closed = False
        self._wakes: set[Callable[[], None]] = set()
        # Tells numbers of this feed from those of another, such as before a restart.
        self.epoch = int.from_bytes(os.urandom(8)) >> 1

    def start(self, kept_blocks: int = KEPT_BLOCKS) -> None:
        """Record from now on; what was there before is in snapshots. Once only counts."""
        with self._lock:
            if self._log is not None:
                return
            self._log = EventLog(kept_blocks)
        for tier in self._tiers:
            with tier.lock:
                tier.slots.listener = _Tap(self.append, tier.name)

    def append(self, event: Event) -> None:
        """Record it, and wake who waits."""
        with self._lock:
            if self._log is None or self._closed:
                return
            self._log.append(event)
            for wake in self._wakes:
                wake()

    def read(self, after_id: int, most_blocks: int) -> list[Numbered]:
        """Events after number `after_id`, oldest first: all, or as many as reach `most_blocks`.

        Raises FallenBehindError where they are no longer kept, ClosedError before `start`.
        """
        with self._lock:
            return self._started().since(after_id, most_blocks)

    @property
    def last_id(self) -> int:
        """The number of the last event. Raises ClosedError before `start`."""
        with self._lock:
            return self._started().last_id

    def snapshot(self) -> Snapshot:
        """What the tiers hold. A second for a million blocks; no lock is held for long.

        Raises FallenBehindError where so much changes meanwhile that the log does not hold
        it, ClosedError before `start`.
        """
        rows = PAGE_ROWS
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._snapshot(rows)
            except FallenBehindError:
                rows *= 16  # in fewer, longer looks
        return self._snapshot(rows)

    def pages(self, rows: int = PAGE_ROWS) -> Iterator[Stored]:
        """What the tiers hold, found row by row while blocks come and go.

        With the events since the `last_id` from before it is what they held at the `last_id`
        from after: a block that stays keeps its row and is found, and of every other the
        events tell what has become of it. A tier's lock is held for one page of rows.
        """
        for tier in self._tiers:
            start = 0
            while start < len(tier.slots.index.keys) and not self._closed:
                yield from _page(tier, slice(start, start + rows))
                start += rows

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Have `wake` called at every event; the result undoes it.

        From any thread, with locks of the store held: it may not use the store, or this.
        """
        with self._lock:
            self._wakes.add(wake)

        def unsubscribe() -> None:
            with self._lock:
                self._wakes.discard(wake)

        return unsubscribe

    def close(self) -> None:
        """Tell that all is gone; nothing is recorded after that. May be called twice."""
        with self._lock:
            if self._log is not None and not self._closed:
                self._log.append(Cleared())
            # Under the same lock: who reads that event, and then nothing, must see the end.
            self._closed = True
            for wake in self._wakes:
                wake()

    @property
    def closed(self) -> bool:
        """Whether nothing will happen any more."""
        return self._closed

    def _started(self) -> EventLog:
        if self._log is None:
            raise ClosedError("no events are recorded: call start() first")
        return self._log

    def _snapshot(self, rows: int) -> Snapshot:
        contents: Contents = {}
        last_id = self.last_id
        for stored in self.pages(rows):
            apply(contents, stored)
        while events := self.read(last_id, KEPT_BLOCKS):
            for number, event in events:
                apply(contents, event)
                last_id = number
        return Snapshot(last_id, contents)


class _Tap:
    """Makes events of what one tier's table tells."""

    def __init__(self, append: Callable[[Event], None], tier: str) -> None:
        self._append = append
        self._tier = tier

    def stored(self, namespace: bytes, keys: Sequence[Key], parents: Sequence[Key]) -> None:
        self._append(Stored(self._tier, namespace, keys, parents))

    def removed(self, namespace: bytes, keys: Sequence[Key]) -> None:
        self._append(Removed(self._tier, namespace, keys))


def _page(tier: Table, rows: slice) -> Iterator[Stored]:
    """What these rows of a tier hold, by namespace."""
    with tier.lock:
        index = tier.slots.index
        keys, parents = index.keys[rows], index.parents[rows]
        numbers = index.namespace[rows].tolist()
        names = tier.slots.fingerprints()
    found: defaultdict[int, dict[Key, Key]] = defaultdict(dict)
    for key, parent, number in zip(keys, parents, numbers, strict=True):
        if key is not None:
            found[number][key] = parent
    for number, held in found.items():
        yield Stored(tier.name, names[number], list(held), list(held.values()))

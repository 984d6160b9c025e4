"""The events of a store: recorded where they become true, read by whoever follows."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
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
_STEP_ROWS = 2048  # copied under a tier's lock at once, for a snapshot
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
        step = _STEP_ROWS
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._snapshot(step)
            except FallenBehindError:
                step *= 16  # in fewer, longer looks
        return self._snapshot(step)

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
        self.append(Cleared())
        with self._lock:
            self._closed = True

    @property
    def closed(self) -> bool:
        """Whether nothing will happen any more."""
        return self._closed

    def _started(self) -> EventLog:
        if self._log is None:
            raise ClosedError("no events are recorded: call start() first")
        return self._log

    def _snapshot(self, step: int) -> Snapshot:
        # Blocks come and go while they are copied. One that does not is copied as it is, for
        # it keeps its row; of every other the events since tell what has become of it.
        contents: Contents = defaultdict(dict)
        last_id = self.last_id
        if not self._closed:
            for tier in self._tiers:
                _copy(tier, contents, step)
        plain = {place: held for place, held in contents.items() if held}
        while events := self.read(last_id, KEPT_BLOCKS):
            for number, event in events:
                apply(plain, event)
                last_id = number
        return Snapshot(last_id, plain)


class _Tap:
    """Makes events of what one tier's table tells."""

    def __init__(self, append: Callable[[Event], None], tier: str) -> None:
        self._append = append
        self._tier = tier

    def stored(self, namespace: bytes, keys: Sequence[Key], parents: Sequence[Key]) -> None:
        self._append(Stored(self._tier, namespace, keys, parents))

    def removed(self, namespace: bytes, keys: Sequence[Key]) -> None:
        self._append(Removed(self._tier, namespace, keys))


def _copy(tier: Table, contents: Contents, step: int) -> None:
    """Add what a tier holds, `step` rows under its lock at a time."""
    slots, start, rows = tier.slots, 0, 1
    while start < rows:
        with tier.lock:
            index = slots.index
            part = slice(start, start + step)
            keys, parents = index.keys[part], index.parents[part]
            numbers = index.namespace[part].tolist()
            names = slots.fingerprints()
            rows = len(index.keys)
        held = [contents[tier.name, name] for name in names]
        for key, parent, number in zip(keys, parents, numbers, strict=True):
            if key is not None:
                held[number][key] = parent
        start += step

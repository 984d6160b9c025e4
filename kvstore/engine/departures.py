"""Blocks on their way from HBM to the store.

A block is offered when it has become full: a slot is reserved for it and the copy started.
It is held in HBM, and unseen in the store, until the copy is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from kvstore.engine.guard import Guard
from kvstore.engine.sequence import TokenSequence
from kvstore.tiers.hbm import HbmTier
from kvstore.tiers.hbm_copies import CopyEvent
from kvstore.verbs import Reservation, Store


@dataclass(eq=False, slots=True)
class _Departure:
    """One copy out, for any number of sequences."""

    blocks: list[int]
    views: list[memoryview]  # kept: what is copied to must not be unmapped meanwhile
    reservations: list[Reservation]
    event: CopyEvent


class Departures:
    """Copies out that are not over. Belongs to the engine's loop."""

    def __init__(self, store: Store, hbm: HbmTier, guard: Guard) -> None:
        self._store = store
        self._hbm = hbm
        self._guard = guard
        self._departures: deque[_Departure] = deque()  # oldest first

    def __bool__(self) -> bool:
        return bool(self._departures)

    def offer(self, sequences: Iterable[TokenSequence]) -> None:
        """Give the store those blocks of `sequences` that have become full. Does not wait.

        A block is offered once. Where the store has no room it is not taken.
        """
        blocks: list[int] = []
        views: list[memoryview] = []
        reservations: list[Reservation] = []
        for sequence in sequences:
            start, stop = sequence.offered_blocks, sequence.computed_blocks
            if start >= stop:
                continue
            sequence.offered_blocks = stop
            if self._guard.is_denied("offer"):
                continue
            with self._guard("offer"):
                self._reserve(sequence, start, stop, blocks, views, reservations)
        if reservations:
            self._start(blocks, views, reservations)

    def poll(self) -> None:
        """Commit what has been copied, and let go of it."""
        while self._departures and self._departures[0].event.done():
            self._finish(self._departures.popleft())

    def wait(self) -> None:
        """Block until the oldest copy is over."""
        if self._departures:
            self._departures[0].event.wait()
            self.poll()

    def _reserve(
        self,
        sequence: TokenSequence,
        start: int,
        stop: int,
        blocks: list[int],
        views: list[memoryview],
        reservations: list[Reservation],
    ) -> None:
        with ExitStack() as on_error:
            reservation = on_error.enter_context(
                self._store.reserve(sequence.chain.chain(start, stop))
            )
            if not reservation.indices:
                return
            own = list(reservation.views)
            on_error.pop_all()  # from here on it ends with the copy
        reservations.append(reservation)
        views += own
        blocks += [sequence.block_table[start + index] for index in reservation.indices]

    def _start(
        self, blocks: list[int], views: list[memoryview], reservations: list[Reservation]
    ) -> None:
        events: list[CopyEvent] = []
        with self._guard("copy out"):
            events.append(self._hbm.copies.copy_out(blocks, views))
        if not events:
            for reservation in reservations:
                with self._guard("abort"):
                    reservation.abort()
            return
        self._hbm.pool.hold(blocks)
        self._departures.append(_Departure(blocks, views, reservations, events[0]))
        self.poll()

    def _finish(self, departure: _Departure) -> None:
        self._hbm.pool.unhold(departure.blocks)
        for reservation in departure.reservations:
            with self._guard("commit"), reservation:
                count = len(reservation.indices)
                reservation.commit()
                self._guard.counters["offloaded_blocks"] += count

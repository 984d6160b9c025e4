"""A conversation whose block bytes follow the words, through the same connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvstore import wire
from kvstore.daemon.conversation import Answer, Conversation
from kvstore.daemon.outbox import Outbox
from kvstore.daemon.service import Service
from kvstore.daemon.session import Session
from kvstore.errors import WireError
from kvstore.reservation import Reservation
from kvstore.retention import Retention


@dataclass(slots=True)
class _Sending:
    """A lease whose blocks are going out: how many the client expects, and how many have gone."""

    told: int
    sent: int = 0


class Slots(NamedTuple):
    """Reserved memory that a client's bytes go to, for the thread that receives them."""

    reservation: Reservation
    memory: memoryview
    block_bytes: int

    def runs(self) -> Iterator[memoryview]:
        """In the order of the blocks; those that lie side by side as one, to be filled at once."""
        starts = self.reservation.offsets()
        breaks = np.flatnonzero(np.diff(starts) != self.block_bytes) + 1
        for run in np.split(starts, breaks):
            if len(run):
                yield self.memory[int(run[0]) : int(run[-1]) + self.block_bytes]


class StreamConversation(Conversation):
    """Nobody outside sees the arena. A lease ends when its last block has gone out."""

    def __init__(
        self,
        service: Service,
        session: Session,
        push: Callable[[wire.Reply], None],
        outbox: Outbox,
    ) -> None:
        super().__init__(service, session, push)
        self._outbox = outbox
        self._sending: dict[int, _Sending] = {}
        self._unwanted: dict[int, int] = {}  # lease -> its blocks that are still to be heard of

    def answer(self, request: wire.Request) -> Answer:
        match request:
            case wire.Release(lease):
                self._let_go(lease)
                return None
            case wire.Acquire():
                return self._acquire(request)
            case wire.Reserve():
                return self._reserve(request)
        return super().answer(request)

    def slots(self, commit: wire.Commit) -> Slots:
        """Where the bytes that follow a commit go. Raises WireError where they do not fit."""
        held = self._session.reservations.get(commit.reservation)
        block_bytes = 0 if held is None else held.reservation.block_bytes
        nbytes = 0 if held is None else len(held.reservation) * block_bytes
        if held is None or nbytes != commit.payload_bytes:
            raise WireError(f"{commit.payload_bytes} bytes announced for a reservation of {nbytes}")
        return Slots(held.reservation, self._service.store.arena.buffer, block_bytes)

    def sent(self, number: int, blocks: int) -> None:
        """So many more blocks of a lease have gone out."""
        if number in self._unwanted:
            self._unwanted[number] -= blocks
            if not self._unwanted[number]:
                del self._unwanted[number]
                self._session.release(number)
        elif number in self._sending:
            self._sending[number].sent += blocks
            self._end_if_sent(number)

    def close(self) -> None:
        super().close()
        self._sending.clear()

    def _acquire(self, request: wire.Acquire) -> wire.Leased:
        number, lease = self._session.acquire(self._chain(request), request.deadline_s)
        self._sending[number] = _Sending(len(lease))
        self._fill(number, lease, 0)
        asyncio.get_running_loop().call_soon(self._report)  # when the client has been told of it
        sources = wire.pack_tiers(lease.sources)
        return wire.Leased(request.seq, number, sources, b"", self._miss(number))

    def _reserve(self, request: wire.Reserve) -> wire.Reserved:
        retention = Retention(request.priority, request.ttl_s)
        number, reservation = self._session.reserve(self._chain(request), retention)
        indices = np.array(reservation.indices, dtype="<u4").tobytes()
        if not len(reservation):  # the client has nothing to give back, and does not
            self._session.abort(number)
        return wire.Reserved(request.seq, number, indices, b"")

    def _report(self) -> None:
        """Send what has become ready, and say where a lease now ends."""
        for number, put in list(self._filling.items()):
            lease = self._session.leases[number].lease
            ready = lease.ready()
            if ready > put:
                self._outbox.put_blocks(number, lease.views[put:ready])
                self._filling[number] = ready
            sending = self._sending[number]
            if len(lease) < sending.told:
                sending.told = len(lease)
                self._push(wire.Progress(number, len(lease), b"", self._miss(number)))
            if ready >= len(lease):
                self._filled(number)
                self._end_if_sent(number)
        self._watch()

    def _end_if_sent(self, number: int) -> None:
        sending = self._sending[number]
        if number not in self._filling and sending.sent >= sending.told:
            del self._sending[number]
            self._outbox.drop(number)
            self._session.release(number)

    def _let_go(self, number: int) -> None:
        """The client wants no more of a lease."""
        self._filled(number)
        sending = self._sending.pop(number, None)
        if sending is None:
            return  # all of it has gone out before
        # One piece may have gone out that we have yet to hear of, and the next be on its way.
        unheard = self._outbox.drop(number) - sending.sent
        if unheard:
            self._unwanted[number] = unheard
        else:
            self._session.release(number)

"""A client's messages, one after the other, and what is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from kvstore import wire
from kvstore.answers import NVME
from kvstore.daemon.inventory import InventoryVerbs
from kvstore.daemon.service import Service
from kvstore.daemon.session import Session
from kvstore.errors import RequestError, RightsError, WireError
from kvstore.hashing import Chain
from kvstore.lease import Lease
from kvstore.retention import Retention

Answer = wire.Reply | None | Awaitable[wire.Reply | None]

DEADLINE_SLACK_S = 0.001  # a timer that fires early would find the lease still waiting


class Conversation:
    """Answers the requests of one session whose block bytes go through the arena.

    Belongs to the event loop's thread. `push` sends what nobody asked for: that more of a
    lease is ready.
    """

    def __init__(
        self, service: Service, session: Session, push: Callable[[wire.Reply], None]
    ) -> None:
        self._service = service
        self._store = service.store
        self._session = session
        self._push = push
        self._inventory = InventoryVerbs(service, session)
        self._filling: dict[int, int] = {}  # lease -> blocks of which the client knows
        self._deadlines: dict[int, asyncio.TimerHandle] = {}  # of those
        self._watching = False

    def answer(self, request: wire.Request) -> Answer:
        """The reply, or something to await for it; replies need not keep the order of requests.

        Raises KVStoreError where the request is refused; the conversation goes on.
        """
        match request:
            case wire.ProbeChain():
                return self._probe(request)
            case wire.Acquire():
                return self._acquire(request)
            case wire.Release():
                self._filled(request.lease)
                self._session.release(request.lease)
                return None
            case wire.Reserve():
                return self._reserve(request)
            case wire.Commit():
                return wire.Counted(request.seq, self._session.commit(request.reservation))
            case wire.Abort():
                self._session.abort(request.reservation)
                return None
            case wire.Prefetch():
                return wire.Counted(request.seq, self._session.prefetch(self._chain(request)))
            case wire.Evict():
                return wire.Counted(request.seq, self._session.evict(self._chain(request)))
            case wire.Retain():
                retained = self._session.retain(self._chain(request), _retention(request))
                return wire.Answered(request.seq, retained._asdict())
            case wire.Explain():
                explained = self._session.explain(self._chain(request))
                return wire.Answered(request.seq, explained.to_dict())
            case wire.GetStats():
                return wire.Answered(request.seq, self._session.stats().to_dict())
            case wire.Flush():
                return self._flush(request)
            case wire.OpenNamespace():
                number = self._session.open_namespace(request.record)
                return wire.NamespaceOpened(request.seq, number)
            case (
                wire.ListNamespaces()
                | wire.ListBlocks()
                | wire.EvictBlocks()
                | wire.CheckBlocks()
                | wire.GetStatus()
            ):
                return self._inventory.answer(request)
            case wire.Hello():
                raise WireError("a second hello on one connection")

    def close(self) -> None:
        for number in list(self._filling):
            self._filled(number)
        self._watch()

    def _chain(self, request: Any) -> Chain:
        return self._session.chain(
            request.namespace, request.parent, wire.unpack_keys(request.keys)
        )

    def _probe(self, request: wire.ProbeChain) -> wire.Probed:
        probe = self._session.probe(self._chain(request))
        cost = self._store.load_costs[NVME]
        latency_s, s_per_byte = cost.coefficients()
        return wire.Probed(
            request.seq,
            wire.pack_tiers(probe.tiers),
            self._store.queued_bytes().get(NVME, 0),
            latency_s,
            s_per_byte,
            cost.observations,
        )

    def _acquire(self, request: wire.Acquire) -> wire.Leased:
        number, lease = self._session.acquire(self._chain(request), request.deadline_s)
        ready = lease.ready()
        if ready < len(lease):
            self._fill(number, lease, ready)
        reply = wire.Leased(
            request.seq,
            number,
            wire.pack_tiers(lease.sources),
            _offsets(lease, 0, ready),
            self._miss(number),
        )
        if not len(lease):  # the client has nothing to give back, and does not
            self._session.release(number)
        return reply

    def _reserve(self, request: wire.Reserve) -> wire.Reserved:
        number, reservation = self._session.reserve(self._chain(request), _retention(request))
        indices = np.array(reservation.indices, dtype="<u4").tobytes()
        offsets = reservation.offsets().astype("<u8").tobytes()
        if not len(reservation):  # as with leases
            self._session.abort(number)
        return wire.Reserved(request.seq, number, indices, offsets)

    def _flush(self, request: wire.Flush) -> Answer:
        self._session.check_right("write")
        return self._flushed(request)

    async def _flushed(self, request: wire.Flush) -> wire.Reply:
        timeout_s = min(request.timeout_s, wire.FLUSH_S)
        return wire.Counted(request.seq, int(await self._service.flush(timeout_s)))

    # ---- leases that are still being filled

    def _fill(self, number: int, lease: Lease, known: int) -> None:
        """Tell the client when more of a lease is ready than it knows, or nothing more comes."""
        self._filling[number] = known
        self._deadlines[number] = asyncio.get_running_loop().call_later(
            lease.left_s() + DEADLINE_SLACK_S, self._report
        )
        self._watch()

    def _filled(self, number: int) -> None:
        """There is nothing more to tell of this lease."""
        if self._filling.pop(number, None) is not None:
            self._deadlines.pop(number).cancel()

    def _watch(self) -> None:
        """Hear of changes exactly while there are leases to tell of."""
        if bool(self._filling) != self._watching:
            self._watching = not self._watching
            (self._service.watch if self._watching else self._service.unwatch)(self._report)

    def _report(self) -> None:
        for number, known in list(self._filling.items()):
            lease = self._session.leases[number].lease
            ready = lease.ready()
            ended = ready >= len(lease)
            if ready > known or ended:
                offsets = _offsets(lease, known, ready)
                self._push(wire.Progress(number, len(lease), offsets, self._miss(number)))
            if ended:
                self._filled(number)
            else:
                self._filling[number] = ready
        self._watch()

    def _miss(self, number: int) -> str | None:
        """Why a lease ends where it does."""
        miss = self._session.leases[number].miss
        return None if miss is None else miss.value


def failed(seq: int, error: Exception) -> wire.Failed:
    """What a client is told of an error; only the name of one that it can know."""
    known = isinstance(error, (RequestError, RightsError, WireError))
    return wire.Failed(seq, type(error).__name__ if known else "KVStoreError", str(error)[:4096])


def _offsets(lease: Lease, start: int, stop: int) -> bytes:
    packed: bytes = lease.offsets(start, stop).astype("<u8").tobytes()
    return packed


def _retention(request: wire.Reserve | wire.Retain) -> Retention:
    return Retention(request.priority, request.ttl_s)

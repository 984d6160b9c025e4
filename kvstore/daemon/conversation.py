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
                self._filling.pop(request.lease, None)
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
        self._filling.clear()
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
            self._filling[number] = ready
            self._watch()
            loop = asyncio.get_running_loop()
            loop.call_later(lease.left_s() + DEADLINE_SLACK_S, self._report)
        return wire.Leased(
            request.seq,
            number,
            wire.pack_tiers(lease.sources),
            _offsets(lease, 0, ready),
            _miss(lease),
        )

    def _reserve(self, request: wire.Reserve) -> Answer:
        number, reservation = self._session.reserve(self._chain(request), _retention(request))
        indices = np.array(reservation.indices, dtype="<u4").tobytes()
        offsets = reservation.offsets().astype("<u8").tobytes()
        reply = wire.Reserved(request.seq, number, indices, offsets)
        if reservation.is_populated:
            return reply

        async def populate() -> wire.Reply:
            """Memory that was never touched: a millisecond for every few blocks."""
            await asyncio.to_thread(reservation.populate)
            return reply

        return populate()

    async def _flush(self, request: wire.Flush) -> wire.Reply:
        timeout_s = min(request.timeout_s, wire.FLUSH_S)
        done = await asyncio.to_thread(self._store.flush, timeout_s)
        return wire.Counted(request.seq, int(done))

    # ---- leases that are still being filled

    def _watch(self) -> None:
        """Hear of changes exactly while there are leases to tell of."""
        if bool(self._filling) != self._watching:
            self._watching = not self._watching
            (self._service.watch if self._watching else self._service.unwatch)(self._report)

    def _report(self) -> None:
        for number, known in list(self._filling.items()):
            held = self._session.leases.get(number)
            if held is None:
                del self._filling[number]
                continue
            lease = held.lease
            ready = lease.ready()
            ended = ready >= len(lease)
            if ready > known or ended:
                offsets = _offsets(lease, known, ready)
                self._push(wire.Progress(number, len(lease), offsets, _miss(lease)))
            if ended:
                del self._filling[number]
            else:
                self._filling[number] = ready
        self._watch()


def failed(seq: int, error: Exception) -> wire.Failed:
    """What a client is told of an error; only the name of one that it can know."""
    known = isinstance(error, (RequestError, RightsError, WireError))
    return wire.Failed(seq, type(error).__name__ if known else "KVStoreError", str(error)[:4096])


def _offsets(lease: Lease, start: int, stop: int) -> bytes:
    packed: bytes = lease.offsets(start, stop).astype("<u8").tobytes()
    return packed


def _miss(lease: Lease) -> str | None:
    return None if lease.miss is None else lease.miss.value


def _retention(request: wire.Reserve | wire.Retain) -> Retention:
    return Retention(request.priority, request.ttl_s)

"""The gRPC service `kvstore.v1.Store`: the store's verbs, and blocks as streams of bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from kvstore.daemon import grpc_messages as messages
from kvstore.daemon.conversation import DEADLINE_SLACK_S
from kvstore.daemon.grpc_calls import Calls, Context
from kvstore.daemon.service import Service
from kvstore.errors import RequestError
from kvstore.lease import Lease
from kvstore.proto import store_pb2 as pb
from kvstore.proto import store_pb2_grpc


class StoreServicer(store_pb2_grpc.StoreServicer):
    """A lease or reservation lives exactly as long as the call that holds it.

    A call ends when it is answered, when it is cancelled, and when its client dies: grpc then
    cancels the task that runs the method, and what it held is given back on the way out.
    """

    def __init__(self, service: Service, calls: Calls) -> None:
        self._service = service
        self._calls = calls

    # ---- questions and hints

    async def Probe(self, request: pb.ProbeRequest, context: Context) -> pb.ProbeReply:
        session = self._calls.passing(context)
        probe = session.probe(messages.chain(request.chain, session.tenant))
        return pb.ProbeReply(tiers=messages.tiers(probe.tiers), prefix_blocks=probe.prefix)

    async def Prefetch(self, request: pb.PrefetchRequest, context: Context) -> pb.PrefetchReply:
        session = self._calls.passing(context)
        chain = messages.chain(request.chain, session.tenant)
        return pb.PrefetchReply(blocks=session.prefetch(chain))

    async def Retain(self, request: pb.RetainRequest, context: Context) -> pb.RetainReply:
        session = self._calls.passing(context)
        chain = messages.chain(request.chain, session.tenant)
        retained = session.retain(chain, messages.retention(request.retention))
        return pb.RetainReply(**retained._asdict())

    async def Evict(self, request: pb.EvictRequest, context: Context) -> pb.EvictReply:
        session = self._calls.passing(context)
        chain = messages.chain(request.chain, session.tenant)
        return pb.EvictReply(blocks=session.evict(chain))

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainReply:
        session = self._calls.passing(context)
        chain = messages.chain(request.chain, session.tenant)
        return messages.explanation(session.explain(chain))

    async def Stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsReply:
        return messages.stats(self._calls.passing(context).stats())

    # ---- bytes

    async def Get(self, request: pb.GetRequest, context: Context) -> None:
        with self._calls.holding(context) as session:
            chain = messages.chain(request.chain, session.tenant)
            deadline_s = None
            if request.HasField("deadline_s"):
                deadline_s = messages.seconds(request.deadline_s, "deadline_s")
            number, lease = session.acquire(chain, deadline_s)
            try:
                await self._send(lease, chain.namespace.layout.block_bytes, context)
                ended = messages.miss(session.leases[number].miss)
                last = pb.GetEnded(blocks=len(lease), miss=ended)
            finally:
                session.release(number)
            await context.write(pb.GetReply(ended=last))

    async def Put(self, requests: AsyncIterator[pb.PutRequest], context: Context) -> None:
        with self._calls.holding(context) as session:
            first = await anext(requests, None)
            if first is None or first.WhichOneof("part") != "begin":
                raise RequestError("a put starts with `begin`")
            chain = messages.chain(first.begin.chain, session.tenant)
            retention = messages.retention(first.begin.retention)
            number, reservation = session.reserve(chain, retention)
            try:
                if not reservation.is_populated:
                    await asyncio.to_thread(reservation.populate)
                block_bytes = chain.namespace.layout.block_bytes
                wanted = pb.PutWanted(blocks=reservation.indices, block_bytes=block_bytes)
                await context.write(pb.PutReply(wanted=wanted))
                await _receive(requests, reservation.views)
                committed = session.commit(number)
            finally:
                session.abort(number)  # where it was not committed
            await context.write(pb.PutReply(committed=pb.PutCommitted(blocks=committed)))

    async def _send(self, lease: Lease, block_bytes: int, context: Context) -> None:
        begun = pb.GetBegun(blocks=len(lease), block_bytes=block_bytes)
        await context.write(pb.GetReply(begun=begun))
        sent = 0
        while sent < len(lease):
            ready = await self._ready_beyond(lease, sent)
            for piece in messages.pieces(lease, sent, ready, block_bytes):
                await context.write(pb.GetReply(piece=piece))
            sent = ready

    async def _ready_beyond(self, lease: Lease, known: int) -> int:
        """Wait until more than `known` leading blocks are ready, or the lease ends there."""
        changed = asyncio.Event()
        self._service.watch(changed.set)
        try:
            while (ready := lease.ready()) <= known and ready < len(lease):
                changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(lease.left_s() + DEADLINE_SLACK_S):
                        await changed.wait()
            return ready
        finally:
            self._service.unwatch(changed.set)


async def _receive(requests: AsyncIterator[pb.PutRequest], views: Sequence[memoryview]) -> None:
    """Fill the views with what comes. Raises RequestError for more bytes than that, or fewer."""
    wanted, received = sum(map(len, views)), 0
    async for request in requests:
        if request.WhichOneof("part") != "data":
            raise RequestError("after its `begin` a put is `data`, and nothing else")
        if received + len(request.data) > wanted:
            raise RequestError(f"more than the {wanted} bytes that were wanted: nothing is stored")
        messages.scatter(views, received, request.data)
        received += len(request.data)
    if received < wanted:
        raise RequestError(f"{received} of {wanted} bytes that were wanted: nothing is stored")

"""The gRPC service `kvstore.v1.Events`: which blocks come and go, for those who follow that."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterator

import grpc

from kvstore.daemon import grpc_messages as messages
from kvstore.daemon.following import Following
from kvstore.daemon.grpc_calls import Calls, Context
from kvstore.daemon.service import Service
from kvstore.daemon.session import Session
from kvstore.errors import FallenBehindError, RequestError
from kvstore.events import Cleared, Event, Stored
from kvstore.feed import Feed
from kvstore.proto import events_pb2 as pb
from kvstore.proto import events_pb2_grpc

NAMESPACES = 1024  # of one subscriber
MESSAGE_BLOCKS = 16_384  # half a MiB

_Wanted = Collection[bytes] | None  # fingerprints; None: all


def add_events(server: grpc.aio.Server, service: Service, calls: Calls) -> str:
    """Serve events there too; returns the service's full name."""
    events_pb2_grpc.add_EventsServicer_to_server(EventsServicer(service, calls), server)
    name: str = pb.DESCRIPTOR.services_by_name["Events"].full_name
    return name


class EventsServicer(events_pb2_grpc.EventsServicer):
    """Nothing is queued for a subscriber: each reads the store's log at its own pace."""

    def __init__(self, service: Service, calls: Calls) -> None:
        self._service = service
        self._calls = calls
        self._following = Following(service.store.feed)

    async def Subscribe(
        self, request: pb.SubscribeRequest, context: Context
    ) -> AsyncIterator[pb.SubscribeReply]:
        with self._calls.holding(context) as session:
            wanted = _wanted(request, session)
            feed = self._service.store.feed
            feed.start(self._service.limits.event_log_blocks)
            if request.HasField("after"):
                after_id = complete_id = _resumed(feed, request.after)
            else:
                after_id = feed.last_id
                for held in feed.pages():
                    for part in _parts(held, wanted):
                        yield pb.SubscribeReply(held=part.stored)
                    await asyncio.sleep(0)  # what nobody asked for takes its time as well
                complete_id = feed.last_id
                if complete_id == after_id:
                    yield _at(feed, after_id, pb.SubscribeReply(complete=pb.Complete()))
            async with contextlib.aclosing(self._following.read(after_id)) as batches:
                async for batch in batches:
                    for number, event in batch:
                        parts = list(_parts(event, wanted))
                        if number == complete_id:
                            parts.append(pb.SubscribeReply(complete=pb.Complete()))
                        if number >= complete_id and parts:
                            _at(feed, number, parts[-1])
                        for part in parts:
                            yield part

    async def Name(self, request: pb.NameRequest, context: Context) -> pb.NameReply:
        session = self._calls.passing(context)
        session.check_right("read")
        chain = messages.chain(request.chain, session.tenant)
        return pb.NameReply(
            fingerprint=chain.namespace.fingerprint, parent=chain.parent, keys=b"".join(chain.keys)
        )


def _wanted(request: pb.SubscribeRequest, session: Session) -> _Wanted:
    """Whose events: only those of namespaces that the tenant itself can name."""
    if not request.namespaces:
        session.check_right("admin")
        return None
    session.check_right("read")
    if len(request.namespaces) > NAMESPACES:
        raise RequestError(f"more than {NAMESPACES} namespaces")
    named = map(messages.namespace, request.namespaces)
    return {session.tenant.namespace(asked).fingerprint for asked in named}


def _resumed(feed: Feed, position: pb.Position) -> int:
    if position.epoch != feed.epoch:
        raise FallenBehindError("that position is of another start of the daemon: take a snapshot")
    feed.read(position.id, 1)
    return position.id


def _at(feed: Feed, number: int, reply: pb.SubscribeReply) -> pb.SubscribeReply:
    reply.position.epoch, reply.position.id = feed.epoch, number
    return reply


def _parts(event: Event, wanted: _Wanted) -> Iterator[pb.SubscribeReply]:
    """An event in as many messages as it takes; in none where nobody asked for it."""
    if isinstance(event, Cleared):
        yield pb.SubscribeReply(cleared=pb.Cleared())
        return
    if wanted is not None and event.namespace not in wanted:
        return
    (tier,) = messages.tiers([event.tier])
    for start in range(0, len(event.keys), MESSAGE_BLOCKS):
        part = slice(start, start + MESSAGE_BLOCKS)
        blocks = pb.Blocks(tier=tier, fingerprint=event.namespace, keys=b"".join(event.keys[part]))
        if isinstance(event, Stored):
            blocks.parents = b"".join(event.parents[part])
            yield pb.SubscribeReply(stored=blocks)
        else:
            yield pb.SubscribeReply(removed=blocks)

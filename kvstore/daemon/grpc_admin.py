"""The gRPC service `kvstore.v1.Admin`: who and what is here, for whoever runs the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np

from kvstore import wire
from kvstore.daemon import grpc_messages as messages
from kvstore.daemon.grpc_calls import Calls, Context
from kvstore.daemon.service import Service
from kvstore.errors import RequestError
from kvstore.hashing import KEY_BYTES
from kvstore.inventory import Inventory
from kvstore.proto import admin_pb2 as pb
from kvstore.proto import admin_pb2_grpc


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """What walks whole tables, or waits, does so in a thread."""

    def __init__(self, service: Service, calls: Calls) -> None:
        self._service = service
        self._calls = calls

    async def ListNamespaces(
        self, request: pb.ListNamespacesRequest, context: Context
    ) -> AsyncIterator[pb.NamespaceUse]:
        self._check(context)
        for namespace, blocks, nbytes in await asyncio.to_thread(self._service.store.usage):
            yield pb.NamespaceUse(
                fingerprint=namespace.fingerprint,
                namespace=messages.record(namespace),
                blocks=blocks,
                bytes=nbytes,
            )

    async def ListTenants(
        self, request: pb.ListTenantsRequest, context: Context
    ) -> AsyncIterator[pb.TenantUse]:
        self._check(context)
        for name, blocks in list(self._service.tenant_blocks.items()):
            yield pb.TenantUse(name=name, blocks=blocks)

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> AsyncIterator[pb.SessionUse]:
        self._check(context)
        for session in list(self._service.sessions):
            yield pb.SessionUse(
                peer=session.peer,
                tenant=session.tenant.name,
                leases=len(session.leases),
                reservations=len(session.reservations),
                in_flight_bytes=session.in_flight_bytes,
            )

    async def Flush(self, request: pb.FlushRequest, context: Context) -> pb.FlushReply:
        self._check(context)
        left_s, done = messages.seconds(request.timeout_s, "timeout_s"), False
        while not done and left_s >= 0:
            # A second at a time: a thread cannot be called back when the client has gone.
            done = await self._service.flush(min(left_s, wire.FLUSH_S))
            left_s -= wire.FLUSH_S
        return pb.FlushReply(done=done)

    async def EvictNamespace(
        self, request: pb.EvictNamespaceRequest, context: Context
    ) -> pb.EvictNamespaceReply:
        self._check(context)
        if len(request.fingerprint) != KEY_BYTES:
            raise RequestError(f"fingerprint: must have {KEY_BYTES} bytes")
        inventory = self._service.store.inventory
        blocks = await asyncio.to_thread(_evict, inventory, request.fingerprint)
        return pb.EvictNamespaceReply(blocks=blocks)

    def _check(self, context: Context) -> None:
        self._calls.passing(context).check_right("admin")


def _evict(inventory: Inventory, fingerprint: bytes) -> int:
    """Drop every block of a namespace, tier by tier and page by page. Blocks while it does."""
    evicted = 0
    for tier in inventory.tiers():
        following: int | None = 0
        while following is not None:
            rows, following = inventory.page(tier, following)
            mine = rows["key"][rows["namespace"] == np.void(fingerprint)]
            evicted += inventory.evict(mine.tolist())
    return evicted

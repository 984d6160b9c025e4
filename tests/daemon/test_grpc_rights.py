"""Who may do what through the gRPC door, and what everybody may ask."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvstore.daemon import grpc_guard
from kvstore.daemon.grpc_door import GrpcDoor
from kvstore.daemon.listening import Endpoint
from kvstore.daemon.tokens import Tenants, TokenRecord, digest_of
from kvstore.errors import SettingsError
from kvstore.identity import salt_digest
from kvstore.proto import admin_pb2, store_pb2
from kvstore.tenant import Right
from tests.daemon.doors import Daemon
from tests.daemon.grpc_client import GrpcClient, message
from tests.store.rig import NAMESPACE, Rig, chain, content, put

Connect = Callable[[str | None], GrpcClient]


def record(token: str, tenant: str, *rights: Right, cap: int = 100) -> TokenRecord:
    return TokenRecord(digest_of(token), tenant, frozenset(rights), None, cap)


@pytest.fixture
def tenants() -> Tenants:
    records = [
        record("one", "red", "read", "write", cap=50),
        record("reader", "red", "read"),
        record("two", "blue", "read", "write"),
        record("root", "ops", "admin"),
    ]
    return Tenants(records, secret=bytes(32))


@pytest.fixture
def connect(address: str) -> Iterator[Connect]:
    """A client with that token."""
    clients: list[GrpcClient] = []

    def made(token: str | None) -> GrpcClient:
        clients.append(GrpcClient(address, token))
        return clients[-1]

    yield made
    for client in clients:
        client.close()


def every_method(client: GrpcClient) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each method with something valid to ask it, and the right, or rights, that allow it."""
    store, admin, asked = client.store, client.admin, message(chain(1))
    begin = store_pb2.PutRequest(begin=store_pb2.PutBegin(chain=asked))
    methods = [
        ("read", store.Probe, store_pb2.ProbeRequest(chain=asked)),
        ("read", store.Get, store_pb2.GetRequest(chain=asked)),
        ("read", store.Prefetch, store_pb2.PrefetchRequest(chain=asked)),
        ("read", store.Explain, store_pb2.ExplainRequest(chain=asked)),
        ("read or admin", store.Stats, store_pb2.StatsRequest()),
        ("write", store.Put, [begin, store_pb2.PutRequest(data=content(chain(1).keys[0]))]),
        ("write", store.Retain, store_pb2.RetainRequest(chain=asked)),
        ("write", store.Evict, store_pb2.EvictRequest(chain=asked)),
        ("admin", admin.ListNamespaces, admin_pb2.ListNamespacesRequest()),
        ("admin", admin.ListTenants, admin_pb2.ListTenantsRequest()),
        ("admin", admin.ListSessions, admin_pb2.ListSessionsRequest()),
        ("admin", admin.Flush, admin_pb2.FlushRequest()),
        ("admin", admin.EvictNamespace, admin_pb2.EvictNamespaceRequest(fingerprint=bytes(16))),
    ]
    for right, method, request in methods:

        def ask(method: Any = method, request: Any = request) -> Any:
            answer = client.ask(method, iter(request) if isinstance(request, list) else request)
            return list(answer) if hasattr(answer, "__next__") else answer

        yield right, ask


def outcome(ask: Callable[[], Any]) -> grpc.StatusCode:
    try:
        ask()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("token", [None, "", "nobody's", "one ", "On" + "e" * 5000])
def test_without_a_known_token_nothing_is_answered(connect: Connect, token: str | None) -> None:
    if token == "one ":  # spaces around a token are no part of it
        assert outcome(next(every_method(connect(token)))[1]) is grpc.StatusCode.OK
        return
    codes = {outcome(ask) for _, ask in every_method(connect(token))}
    assert codes == {grpc.StatusCode.UNAUTHENTICATED}


def test_other_schemes_are_no_tokens(connect: Connect) -> None:
    method, request = connect(None).store.Stats, store_pb2.StatsRequest()
    for value in ("one", "Basic one", "Bearerone", "Bearer"):
        with pytest.raises(grpc.RpcError) as refused:
            method(request, metadata=[("authorization", value)])
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    method(request, metadata=[("authorization", "bearer one")])


@pytest.mark.parametrize(
    ("token", "rights"),
    [("reader", {"read"}), ("one", {"read", "write"}), ("root", {"admin"})],
)
def test_a_token_is_good_for_its_rights_alone(
    connect: Connect, token: str, rights: set[Right]
) -> None:
    for right, ask in every_method(connect(token)):
        allowed = not rights.isdisjoint(right.split(" or "))
        expected = grpc.StatusCode.OK if allowed else grpc.StatusCode.PERMISSION_DENIED
        assert outcome(ask) is expected


def test_tenants_do_not_meet(connect: Connect, rig: Rig) -> None:
    red, reader, blue = connect("one"), connect("reader"), connect("two")
    blocks = chain(4)
    put(rig.store, chain(2))  # of this machine's user: nobody's here
    assert red.put(blocks) == 4
    assert reader.get(blocks).blocks == 4
    assert blue.get(blocks) == (0, "MISS_ABSENT", b"", [])
    evict = store_pb2.EvictRequest(chain=message(blocks))
    assert blue.ask(blue.store.Evict, evict).blocks == 0
    # Nor by naming the salt, or the keys, under which the store knows red's blocks.
    (own,) = {used for used in rig.store.inventory.namespaces().values() if used.salt}
    keys = tuple(key for key in rig.ram.slots.index.rows_by_key if key not in chain(2).keys)
    for lie in (
        message(chain(4, namespace=own)),
        message(replace(blocks, namespace=own, keys=keys)),
        message(replace(blocks, namespace=own, parent=own.fingerprint, keys=keys)),
        message(chain(4, namespace=replace(NAMESPACE, salt=salt_digest("red")))),
    ):
        probe = blue.ask(blue.store.Probe, store_pb2.ProbeRequest(chain=lie))
        assert list(probe.tiers) == [store_pb2.TIER_UNSPECIFIED] * 4
    assert red.get(blocks).blocks == 4


def test_nobody_learns_of_others_namespaces(connect: Connect) -> None:
    red, blue, blocks = connect("one"), connect("two"), chain(2)

    def explained() -> Any:
        return blue.ask(blue.store.Explain, store_pb2.ExplainRequest(chain=message(blocks)))

    before = explained()
    red.put(blocks)
    assert explained() == before
    assert (before.miss, before.nearest) == (store_pb2.MISS_ABSENT, "")


def test_priority_is_capped(connect: Connect, rig: Rig) -> None:
    assert connect("one").put(chain(2), priority=100) == 2
    index = rig.ram.slots.index
    assert [index.priority[row] for row in index.rows_by_key.values()] == [50, 50]


def test_health_and_reflection_need_no_token(connect: Connect, daemon: Daemon) -> None:
    channel = connect(None).channel
    health: Any = health_pb2_grpc.HealthStub(channel)
    for name in ("", "kvstore.v1.Store", "kvstore.v1.Admin"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as unknown:
        health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (reply,) = reflection.ServerReflectionInfo(iter([request]))
    names = {each.name for each in reply.list_services_response.service}
    assert {"kvstore.v1.Store", "kvstore.v1.Admin", "grpc.health.v1.Health"} <= names


def test_strangers_leave_calls_to_others(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_guard, "OPEN_STREAMS", 2)
    stranger = connect(None).channel
    health: Any = health_pb2_grpc.HealthStub(stranger)
    watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
    assert [next(watch).status for watch in watches] == [health_pb2.HealthCheckResponse.SERVING] * 2
    with pytest.raises(grpc.RpcError) as refused:
        next(health.Watch(health_pb2.HealthCheckRequest()))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    health.Check(health_pb2.HealthCheckRequest())
    for watch in watches:
        watch.cancel()


@pytest.mark.usefixtures("_grpc_runtime")
def test_an_ending_daemon_is_not_healthy(daemon: Daemon) -> None:
    door = daemon.run(GrpcDoor.open(daemon.service, Tenants(), Endpoint("127.0.0.1", 0)))
    with grpc.insecure_channel(f"127.0.0.1:{door.port}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="kvstore.v1.Store"))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        closing = asyncio.run_coroutine_threadsafe(door.close(), daemon.service._loop)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        closing.result()
        with pytest.raises(grpc.RpcError) as ended:
            next(watch)
    assert ended.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def test_it_listens_only_where_it_may(daemon: Daemon, address: str) -> None:
    port = int(address.rpartition(":")[2])
    with pytest.raises(SettingsError, match="cannot listen there"):
        daemon.run(GrpcDoor.open(daemon.service, Tenants(), Endpoint("127.0.0.1", port)))
    for host in ("", "0.0.0.0", "::"):
        with pytest.raises(SettingsError, match="without tokens only this machine"):
            daemon.run(GrpcDoor.open(daemon.service, Tenants(), Endpoint(host, 0)))

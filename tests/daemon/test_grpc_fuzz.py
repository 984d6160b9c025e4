"""Anything at all through the gRPC door: what makes no sense is refused, and nothing is held."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.proto import admin_pb2, events_pb2, store_pb2
from tests.daemon.doors import Daemon
from tests.daemon.grpc_client import GrpcClient, holds_nothing, message, namespace
from tests.store.rig import BLOCK, NAMESPACE, PATIENCE_S, Rig, chain

METHODS: list[MethodDescriptor] = [
    *store_pb2.DESCRIPTOR.services_by_name["Store"].methods,
    *admin_pb2.DESCRIPTOR.services_by_name["Admin"].methods,
    events_pb2.DESCRIPTOR.services_by_name["Events"].methods_by_name["Name"],
]
# Not INTERNAL, not UNKNOWN: those say that the daemon did not expect it.
EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
GROWTH_KIB = 32 << 10

F = FieldDescriptor
VALUES: dict[int, st.SearchStrategy[Any]] = {
    F.TYPE_STRING: st.text(max_size=50)
    | st.sampled_from(["int8", "sha256"])
    | st.just("a" * 20_000),
    F.TYPE_BYTES: st.binary(max_size=200) | st.integers(0, 5).map(lambda n: bytes(16 * n)),
    F.TYPE_UINT32: st.sampled_from([0, 1, 100, 2**31, 2**32 - 1]),
    F.TYPE_DOUBLE: st.floats() | st.floats(0, 1),
}
VALID: dict[str, Any] = {"Namespace": namespace(NAMESPACE), "Chain": message(chain(3))}

fuzzed = settings(
    max_examples=settings().max_examples // 3,  # of each method, twice
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def messages(kind: Descriptor) -> st.SearchStrategy[Any]:
    """Messages of that type, valid but for some of their fields, which are anything."""
    fields = list(kind.fields)
    inner = [each for each in fields if each.message_type is not None]
    valid = VALID.get(kind.name, GetMessageClass(kind)())

    def filled(chosen: dict[str, Any]) -> Any:
        made = GetMessageClass(kind)(**chosen)
        whole = GetMessageClass(kind).FromString(valid.SerializeToString())
        for each in chosen:
            whole.ClearField(each)
        whole.MergeFrom(made)
        return whole

    def choice(odd: list[FieldDescriptor]) -> st.SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries({each.name: values(each) for each in (*inner, *odd)})

    some = st.lists(st.sampled_from(fields), max_size=2, unique_by=lambda each: each.name)
    return (some if fields else st.just([])).flatmap(choice).map(filled)


def values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    return messages(field.message_type) if field.message_type else VALUES[field.type]


@pytest.fixture
def raw(remote: GrpcClient, daemon: Daemon, rig: Rig) -> Any:
    """Asks a method with these bytes; returns how the call has ended."""

    def ask(method: MethodDescriptor, requests: Sequence[bytes]) -> grpc.StatusCode:
        path = f"/{method.containing_service.full_name}/{method.name}"
        channel: Any = remote.channel
        if method.client_streaming:
            call = channel.stream_stream(path)(iter(requests), timeout=PATIENCE_S)
        else:
            call = channel.unary_stream(path)(requests[0], timeout=PATIENCE_S)
        try:
            list(call)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        return grpc.StatusCode.OK

    return ask


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_any_bytes(method: MethodDescriptor, raw: Any, daemon: Daemon, rig: Rig) -> None:
    @fuzzed
    @given(st.lists(st.binary(max_size=300), min_size=1, max_size=4))
    def run(requests: list[bytes]) -> None:
        assert raw(method, requests) in EXPECTED

    run()
    holds_nothing(daemon)
    assert daemon.call(lambda: len(daemon.service._watchers)) == 0


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_any_values(method: MethodDescriptor, raw: Any, daemon: Daemon, rig: Rig) -> None:
    @fuzzed
    @given(st.lists(messages(method.input_type), min_size=1, max_size=4))
    def run(requests: list[Any]) -> None:
        assert raw(method, [each.SerializeToString() for each in requests]) in EXPECTED

    run()
    holds_nothing(daemon)
    assert daemon.call(lambda: len(daemon.service._watchers)) == 0
    assert rig.store.stats().ram["used_bytes"] <= rig.store.stats().ram["blocks"] * BLOCK


def test_malformed_calls_leave_no_trace(raw: Any, daemon: Daemon, rig: Rig) -> None:
    """Neither memory nor tasks, however many there are."""
    put = store_pb2.PutRequest(begin=store_pb2.PutBegin(chain=message(chain(20))))
    short = [put.SerializeToString(), store_pb2.PutRequest(data=bytes(100_000)).SerializeToString()]

    def abuse(times: int) -> None:
        for _ in range(times):
            for method in METHODS:
                raw(method, [b"\xff" * 100_000])
                raw(method, short)

    abuse(10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tasks = daemon.call(lambda: len(asyncio.all_tasks()))
    abuse(60)
    holds_nothing(daemon)
    assert daemon.call(lambda: len(daemon.service._watchers)) == 0
    daemon.until(lambda: len(asyncio.all_tasks()) <= tasks + 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH_KIB
    assert rig.store.stats().ram["used_bytes"] == 0


WHOLE = message(chain(3))


def odd_chain(**odd: Any) -> store_pb2.Chain:
    return store_pb2.Chain(**{"namespace": WHOLE.namespace, "keys": WHOLE.keys, **odd})


def odd_namespace(**odd: Any) -> store_pb2.Chain:
    other = store_pb2.Namespace()
    other.CopyFrom(WHOLE.namespace)
    other.MergeFrom(store_pb2.Namespace(**odd))
    return odd_chain(namespace=other)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (odd_chain(keys=bytes(17)), "17 bytes are no whole number of keys"),
        (odd_chain(parent=b"1"), "a parent of 1 bytes"),
        (odd_namespace(kv_dtype="double"), "KV dtype 'double' is not one of"),
        (odd_namespace(hash_algorithm="md5"), "hash algorithm 'md5' is not known"),
        (odd_namespace(layers=2**32 - 1, head_dim=2**32 - 1), "more than 1099511627776 bytes"),
        (odd_namespace(rope="x" * 20_000), "more than 16384 bytes of text"),
        (store_pb2.Chain(keys=WHOLE.keys), "namespace"),
    ],
)
def test_what_is_no_chain_is_refused(remote: GrpcClient, asked: store_pb2.Chain, says: str) -> None:
    begin = store_pb2.PutRequest(begin=store_pb2.PutBegin(chain=asked))
    for method, request in (
        (remote.store.Probe, store_pb2.ProbeRequest(chain=asked)),
        (remote.store.Get, store_pb2.GetRequest(chain=asked)),
        (remote.store.Put, iter([begin])),
        (remote.store.Prefetch, store_pb2.PrefetchRequest(chain=asked)),
        (remote.store.Retain, store_pb2.RetainRequest(chain=asked)),
        (remote.store.Evict, store_pb2.EvictRequest(chain=asked)),
        (remote.store.Explain, store_pb2.ExplainRequest(chain=asked)),
    ):
        assert says in refusal(remote, method, request)


@pytest.mark.parametrize("time_s", [-1.0, float("nan"), float("inf"), 1e10])
def test_what_is_no_time_is_refused(remote: GrpcClient, time_s: float) -> None:
    get = store_pb2.GetRequest(chain=WHOLE, deadline_s=time_s)
    assert "deadline_s" in refusal(remote, remote.store.Get, get)
    flush = admin_pb2.FlushRequest(timeout_s=time_s)
    assert "timeout_s" in refusal(remote, remote.admin.Flush, flush)


@pytest.mark.parametrize(
    ("odd", "says"),
    [({"priority": 101}, "priority 101"), ({"ttl_s": 0.0}, "ttl_s 0.0"), ({"ttl_s": -1.0}, "-1.0")],
)
def test_what_is_no_retention_is_refused(remote: GrpcClient, odd: Any, says: str) -> None:
    asked = store_pb2.Retention(**odd)
    retain = store_pb2.RetainRequest(chain=WHOLE, retention=asked)
    assert says in refusal(remote, remote.store.Retain, retain)
    begin = store_pb2.PutRequest(begin=store_pb2.PutBegin(chain=WHOLE, retention=asked))
    assert says in refusal(remote, remote.store.Put, iter([begin]))


def test_what_is_no_fingerprint_is_refused(remote: GrpcClient) -> None:
    evict = admin_pb2.EvictNamespaceRequest(fingerprint=b"short")
    assert "16 bytes" in refusal(remote, remote.admin.EvictNamespace, evict)


def refusal(remote: GrpcClient, method: Any, request: Any) -> str:
    with pytest.raises(grpc.RpcError) as refused:
        list(remote.ask(method, request))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return str(refused.value)

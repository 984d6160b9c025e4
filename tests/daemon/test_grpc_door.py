"""The gRPC door: every verb, what a call holds, and when it is given back."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from kvstore.client.client import StoreClient
from kvstore.daemon.service import Limits
from kvstore.hashing import Key
from kvstore.proto import admin_pb2, store_pb2
from tests.cli.commands import environment
from tests.daemon.doors import Daemon
from tests.daemon.grpc_client import GrpcClient, holds_nothing, message, namespace
from tests.store.rig import BLOCK, NAMESPACE, PATIENCE_S, Rig, chain, content, get, put


def data_of(keys: Iterable[Key]) -> bytes:
    return b"".join(map(content, keys))


# ---- the verbs


def test_what_is_put_can_be_got(remote: GrpcClient, rig: Rig, client: StoreClient) -> None:
    blocks = chain(30)
    assert remote.put(blocks) == 30
    assert remote.get(blocks) == (30, "MISS_UNSPECIFIED", data_of(blocks), ["TIER_RAM"] * 30)
    assert get(rig.store, blocks) == get(client, blocks) == 30


def test_a_chain_may_begin_in_the_middle_of_a_prompt(remote: GrpcClient, rig: Rig) -> None:
    put(rig.store, chain(10))
    later = chain(10).slice(4)
    assert remote.get(later).data == data_of(later)


def test_a_get_ends_where_the_prefix_does(remote: GrpcClient, rig: Rig) -> None:
    put(rig.store, chain(3))
    assert remote.get(chain(5)) == (3, "MISS_ABSENT", data_of(chain(3)), ["TIER_RAM"] * 3)
    assert remote.get(chain(5, seed=1)) == (0, "MISS_ABSENT", b"", [])


def test_a_put_sends_only_what_is_wanted(remote: GrpcClient, rig: Rig) -> None:
    put(rig.store, chain(3))
    with remote.start_put(chain(5)) as writing:
        assert writing.wanted == [3, 4]
        assert writing.block_bytes == BLOCK
        writing.send(data_of(chain(5).keys[3:]))
        assert writing.end() == 2
    with remote.start_put(chain(5)) as writing:
        assert writing.wanted == []
        assert writing.end() == 0
    assert get(rig.store, chain(5)) == 5


def test_of_two_puts_the_first_commit_wins(remote: GrpcClient, rig: Rig) -> None:
    blocks = chain(4)
    with remote.start_put(blocks) as slower, remote.start_put(blocks) as faster:
        faster.send(data_of(blocks))
        assert faster.end() == 4
        slower.send(data_of(blocks))
        assert slower.end() == 0
    assert get(rig.store, blocks) == 4


def test_questions(remote: GrpcClient, rig: Rig) -> None:
    rig.store_below(chain(2))
    put(rig.store, chain(2, seed=1))
    asked = message(chain(3))
    probed = remote.ask(remote.store.Probe, store_pb2.ProbeRequest(chain=asked))
    assert list(probed.tiers) == [2, 2, 0]
    assert probed.prefix_blocks == 2
    explained = remote.ask(remote.store.Explain, store_pb2.ExplainRequest(chain=asked))
    assert (explained.blocks, explained.present, explained.breaks_at) == (3, 2, 2)
    assert explained.miss == store_pb2.MISS_ABSENT
    other = message(chain(1, namespace=replace(NAMESPACE, weights="others")))
    explained = remote.ask(remote.store.Explain, store_pb2.ExplainRequest(chain=other))
    assert not explained.namespace_known
    difference = explained.differences[0]
    assert (difference.field, difference.asked, difference.stored) == (
        *("weights", "others"),
        NAMESPACE.weights,
    )
    stats = remote.ask(remote.store.Stats, store_pb2.StatsRequest())
    assert stats.ram["blocks"] == 2
    assert stats.nvme["capacity_bytes"] > 0


def test_prefetch_retain_evict(remote: GrpcClient, rig: Rig) -> None:
    rig.store_below(chain(4))
    prefetch = store_pb2.PrefetchRequest(chain=message(chain(4)))
    assert remote.ask(remote.store.Prefetch, prefetch).blocks == 4
    rig.until(lambda: len(rig.ram.slots) == 4)
    retain = store_pb2.RetainRequest(
        chain=message(chain(5)), retention=store_pb2.Retention(priority=80, ttl_s=60)
    )
    retained = remote.ask(remote.store.Retain, retain)
    assert (retained.accepted, retained.absent) == (4, 1)
    assert rig.column("priority", chain(4)) == [80] * 4
    evict = store_pb2.EvictRequest(chain=message(chain(4)))
    assert remote.ask(remote.store.Evict, evict).blocks == 4
    assert rig.store.probe(chain(4)).prefix == 0


def test_a_put_says_how_firmly_to_keep(remote: GrpcClient, rig: Rig) -> None:
    remote.put(chain(2), priority=70)
    remote.put(chain(2, seed=1))
    assert rig.column("priority", chain(2)) == [70, 70]
    assert rig.column("priority", chain(2, seed=1)) == [35, 35]


# ---- blocks that are on their way


def test_blocks_come_as_they_are_ready(remote: GrpcClient, rig: Rig) -> None:
    rig.store_below(chain(6))
    put(rig.store, chain(2))
    rig.gate.hold("read")
    call = remote.start_get(chain(6))
    assert next(call).begun.blocks == 6
    first = next(call).piece  # what RAM has does not wait for the drive
    assert (first.block, first.source, first.data) == (0, store_pb2.TIER_RAM, data_of(chain(2)))
    rig.gate.arrived("read")
    rig.gate.release()
    replies = list(call)
    assert {reply.piece.source for reply in replies[:-1]} == {store_pb2.TIER_NVME}
    assert b"".join(reply.piece.data for reply in replies[:-1]) == data_of(chain(6).keys[2:])
    assert replies[-1].ended.blocks == 6


def test_what_is_late_is_a_miss(remote: GrpcClient, rig: Rig, daemon: Daemon) -> None:
    rig.store_below(chain(4))
    rig.gate.hold("read")
    assert remote.get(chain(4), deadline_s=0.01) == (0, "MISS_DEADLINE", b"", [])
    holds_nothing(daemon)


def test_a_cancelled_get_gives_its_pins_back(remote: GrpcClient, rig: Rig, daemon: Daemon) -> None:
    rig.store_below(chain(6))
    put(rig.store, chain(2))
    rig.gate.hold("read")
    call = remote.start_get(chain(6))
    next(call), next(call)
    assert rig.store.stats().ram["pinned_blocks"] == 2
    (session,) = daemon.service.sessions
    assert len(session.leases) == 1
    call.cancel()
    holds_nothing(daemon)


def test_a_cancelled_put_leaves_nothing(remote: GrpcClient, rig: Rig, daemon: Daemon) -> None:
    with remote.start_put(chain(3, seed=1)):  # the session goes on
        with remote.start_put(chain(8)) as writing:
            assert len(writing.wanted) == 8
            assert rig.store.stats().ram["used_bytes"] == 11 * BLOCK
            writing.send(data_of(chain(5)))
        daemon.until(lambda: rig.store.stats().ram["used_bytes"] == 3 * BLOCK)
    holds_nothing(daemon)
    assert rig.store.stats().ram["used_bytes"] == 0
    assert rig.store.probe(chain(8)).prefix == 0


DYING = """
import sys
from tests.daemon.grpc_client import GrpcClient
from tests.store.rig import chain
client = GrpcClient(sys.argv[1])
reading = client.start_get(chain(4))
next(reading)
writing = client.start_put(chain(8, seed=1))
writing.send(bytes(1000))
print("holding", flush=True)
sys.stdin.read()
"""


def test_a_killed_client_gives_everything_back(
    remote: GrpcClient, rig: Rig, daemon: Daemon, address: str, tmp_path: Path
) -> None:
    rig.store_below(chain(4))
    rig.gate.hold("read")
    command = [sys.executable, "-c", DYING, address]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=environment(tmp_path)) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == b"holding\n"
        (session,) = daemon.service.sessions
        assert (len(session.leases), len(session.reservations)) == (1, 1)
        process.send_signal(signal.SIGKILL)
    holds_nothing(daemon)
    rig.gate.release()
    assert remote.get(chain(4)).blocks == 4
    assert rig.store.probe(chain(8, seed=1)).prefix == 0


# ---- puts that go wrong


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"", "0 of 16384 bytes"),
        (bytes(2 * BLOCK - 1), "16383 of 16384 bytes"),
        (bytes(2 * BLOCK + 1), "more than the 16384 bytes"),
    ],
)
def test_a_put_of_the_wrong_length_stores_nothing(
    remote: GrpcClient, rig: Rig, daemon: Daemon, sent: bytes, says: str
) -> None:
    with remote.start_put(chain(2)) as writing:
        writing.send(sent)
        with pytest.raises(grpc.RpcError) as refused:
            writing.end()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert says in str(refused.value)
    holds_nothing(daemon)
    assert rig.store.stats().ram["used_bytes"] == 0


def test_a_put_begins_once(remote: GrpcClient, daemon: Daemon, rig: Rig) -> None:
    begin = store_pb2.PutRequest(begin=store_pb2.PutBegin(chain=message(chain(2))))
    for requests in ([], [store_pb2.PutRequest()], [store_pb2.PutRequest(data=b"1")]):
        with pytest.raises(grpc.RpcError, match="a put starts with `begin`"):
            list(remote.ask(remote.store.Put, iter(requests)))
    with remote.start_put(chain(2)) as writing:
        writing.send_message(begin)
        with pytest.raises(grpc.RpcError, match="and nothing else"):
            writing.end()
    holds_nothing(daemon)
    assert rig.store.stats().ram["used_bytes"] == 0


# ---- limits


@pytest.mark.parametrize("limits", [Limits(in_flight_bytes=6 * BLOCK)])
def test_the_calls_of_a_connection_share_a_bound(
    remote: GrpcClient, rig: Rig, daemon: Daemon, address: str
) -> None:
    put(rig.store, chain(8))
    assert remote.get(chain(8)) == (6, "MISS_TOO_SLOW", data_of(chain(6)), ["TIER_RAM"] * 6)
    with remote.start_put(chain(4, seed=1)) as writing:
        assert len(writing.wanted) == 4
        for _ in range(2):
            assert remote.get(chain(8)).blocks == 2
        with GrpcClient(address) as another:
            assert another.get(chain(8)).blocks == 6
    holds_nothing(daemon)
    assert remote.get(chain(8)).blocks == 6


@pytest.mark.parametrize("limits", [Limits(connections=2)])
def test_more_clients_or_calls_than_allowed_are_refused(
    remote: GrpcClient, client: StoreClient, address: str
) -> None:
    with remote.start_put(chain(1)):
        with pytest.raises(grpc.RpcError) as refused, GrpcClient(address) as another:
            another.get(chain(1))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with remote.start_put(chain(1)), pytest.raises(grpc.RpcError) as refused:
            remote.ask(remote.store.Stats, store_pb2.StatsRequest())
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("limits", [Limits(connections=2)])
def test_more_connections_than_allowed_are_closed(address: str) -> None:
    host, _, port = address.partition(":")
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_connection((host, int(port)), PATIENCE_S))
            for _ in range(3)
        ]
        assert [len(each.recv(9)) for each in sockets] == [9, 9, 0]  # a first frame, or the end


def test_long_messages_are_refused(remote: GrpcClient, daemon: Daemon, rig: Rig) -> None:
    probe = store_pb2.ProbeRequest(chain=message(chain(1)))
    probe.chain.keys = bytes(5 << 20)
    with pytest.raises(grpc.RpcError) as refused:
        remote.ask(remote.store.Probe, probe)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError) as refused:  # short only as long as it is compressed
        remote.store.Probe(probe, compression=grpc.Compression.Gzip)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    probe.chain.keys = bytes(16 * 65_537)
    with pytest.raises(grpc.RpcError, match="more than 65536 keys"):
        remote.ask(remote.store.Probe, probe)
    with remote.start_put(chain(2)) as writing:
        writing.send_message(store_pb2.PutRequest(data=bytes(5 << 20)))
        with pytest.raises(grpc.RpcError) as refused:
            writing.end()
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    holds_nothing(daemon)
    assert rig.store.stats().ram["used_bytes"] == 0


# ---- the administrator


def test_who_and_what_is_here(remote: GrpcClient, rig: Rig, client: StoreClient) -> None:
    rig.store_below(chain(3))
    put(rig.store, chain(2))
    remote.get(chain(2))
    (used,) = remote.ask(remote.admin.ListNamespaces, admin_pb2.ListNamespacesRequest())
    assert used.fingerprint == NAMESPACE.fingerprint
    assert used.namespace == namespace(NAMESPACE)
    assert used.blocks == {"ram": 2, "nvme": 3}
    assert used.bytes == {"ram": 2 * BLOCK, "nvme": 3 * BLOCK}
    with client.acquire(chain(2)), remote.start_put(chain(4)):
        sessions = list(remote.ask(remote.admin.ListSessions, admin_pb2.ListSessionsRequest()))
        held = {each.peer.partition(":")[0].partition(" ")[0]: each for each in sessions}
        assert (held["pid"].tenant, held["pid"].leases) == ("local", 1)
        assert held["pid"].in_flight_bytes == 2 * BLOCK
        assert (held["ipv4"].tenant, held["ipv4"].reservations) == ("loopback", 1)
    tenants = remote.ask(remote.admin.ListTenants, admin_pb2.ListTenantsRequest())
    assert {each.name: dict(each.blocks) for each in tenants}["loopback"] == {
        "asked": 2,
        "hit_ram": 2,
    }


def test_flush_and_evict_a_namespace(remote: GrpcClient, rig: Rig) -> None:
    other = replace(NAMESPACE, adapter="lora")
    put(rig.store, chain(5))
    put(rig.store, chain(4, namespace=other))
    assert remote.ask(remote.admin.Flush, admin_pb2.FlushRequest(timeout_s=PATIENCE_S)).done
    assert rig.nvme.stats()["blocks"] == 9
    rig.drop_from_ram(chain(3))
    evict = admin_pb2.EvictNamespaceRequest(fingerprint=NAMESPACE.fingerprint)
    assert remote.ask(remote.admin.EvictNamespace, evict).blocks == 5
    assert rig.store.probe(chain(5)).prefix == 0
    assert get(rig.store, chain(4, namespace=other)) == 4


def test_a_flush_that_takes_too_long_says_so(remote: GrpcClient, rig: Rig) -> None:
    rig.gate.hold("write")
    put(rig.store, chain(2))
    assert not remote.ask(remote.admin.Flush, admin_pb2.FlushRequest(timeout_s=0.01)).done

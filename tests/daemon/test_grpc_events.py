"""The Events service: what a subscriber knows is what the store holds, and nobody else's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import grpc
import pytest

from kvstore.daemon import grpc_events
from kvstore.daemon.service import Limits
from kvstore.daemon.tokens import Tenants, TokenRecord, digest_of
from kvstore.events import Contents, Stored
from kvstore.feed import Table
from kvstore.hashing import KEY_BYTES, Chain, Key
from kvstore.proto import events_pb2 as pb
from kvstore.proto import events_pb2_grpc, store_pb2
from kvstore.tenant import Right
from tests.daemon.grpc_client import GrpcClient, message, namespace
from tests.store.rig import NAMESPACE, PATIENCE_S, Rig, chain, put

OTHER = replace(NAMESPACE, model="other")
TIERS = {store_pb2.TIER_RAM: "ram", store_pb2.TIER_NVME: "nvme"}


def cut(joined: bytes) -> list[Key]:
    return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)]


class Subscriber:
    """What a client of the stream knows, checked as the comments in events.proto have it."""

    def __init__(self, client: GrpcClient, before: Subscriber | None = None, **asked: Any) -> None:
        """Goes on from where `before` has come to."""
        stub: Any = events_pb2_grpc.EventsStub(client.channel)
        self.contents: Contents = {} if before is None else before.contents
        self.complete = before is not None
        self.position: pb.Position | None = None if before is None else before.position
        request = pb.SubscribeRequest(after=self.position, **asked)
        self.call = client.ask(stub.Subscribe, request)

    def receive(self) -> str:
        """One message; returns what kind it was. Raises grpc.RpcError."""
        reply = next(self.call)
        kind: str = reply.WhichOneof("part")
        if kind in ("held", "stored", "removed"):
            self._apply(kind, getattr(reply, kind))
        elif kind == "cleared":
            self.contents.clear()
        else:
            assert not self.complete
            self.complete = True
        if reply.HasField("position"):
            assert self.complete
            if self.position is not None:
                assert reply.position.epoch == self.position.epoch
                assert reply.position.id > self.position.id
            self.position = reply.position
        return kind

    def begin(self) -> Subscriber:
        """Receive the snapshot."""
        while not self.complete:
            self.receive()
        return self

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.receive()

    def blocks(self) -> dict[tuple[str, bytes], dict[Key, Key]]:
        return {place: held for place, held in self.contents.items() if held}

    def _apply(self, kind: str, blocks: pb.Blocks) -> None:
        held = self.contents.setdefault((TIERS[blocks.tier], blocks.fingerprint), {})
        keys, parents = cut(blocks.keys), cut(blocks.parents)
        if self.complete:
            assert kind != "held"
            assert [key in held for key in keys] == [kind == "removed"] * len(keys)
        if kind == "removed":
            assert parents == []
            for key in keys:
                held.pop(key, None)
        else:
            held.update(zip(keys, parents, strict=True))


def truth(rig: Rig, *wanted: bytes) -> dict[tuple[str, bytes], dict[Key, Key]]:
    """What is held of these namespaces (default: of all) when nothing moves."""
    settle(rig)
    found: dict[tuple[str, bytes], dict[Key, Key]] = {}
    tiers: list[Table] = [rig.ram, rig.nvme]
    for tier in tiers:
        with tier.lock:
            index = tier.slots.index
            for key, row in index.rows_by_key.items():
                name = tier.slots.namespace(row)
                if not wanted or name in wanted:
                    found.setdefault((tier.name, name), {})[key] = index.parents[row]
    return found


def settle(rig: Rig) -> None:
    assert rig.store.flush(PATIENCE_S)
    rig.until(rig.is_quiet)


def agree(rig: Rig, subscriber: Subscriber) -> None:
    wanted = truth(rig)
    subscriber.until(lambda: subscriber.complete and subscriber.blocks() == wanted)


def stir(rig: Rig, steps: int, seed: int = 1) -> None:
    dice = random.Random(seed)
    for _ in range(steps):
        blocks = chain(dice.randrange(1, 20), dice.randrange(30), dice.choice([NAMESPACE, OTHER]))
        if dice.random() < 0.8:
            put(rig.store, blocks)
        else:
            rig.store.evict(blocks)
        if dice.random() < 0.2:
            settle(rig)


def refused(subscriber: Subscriber) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as error:
        subscriber.until(lambda: False)
    return error.value


def test_a_subscriber_knows_what_the_store_holds(rig: Rig, remote: GrpcClient) -> None:
    stir(rig, 50, seed=2)
    subscriber = Subscriber(remote).begin()
    stir(rig, 200)
    agree(rig, subscriber)
    assert rig.ram.slots.evicted_blocks > 200
    late = Subscriber(remote)
    agree(rig, late)
    subscriber.call.cancel()
    late.call.cancel()


def test_an_empty_store_is_complete_at_once(remote: GrpcClient) -> None:
    subscriber = Subscriber(remote)
    assert subscriber.receive() == "complete"
    assert subscriber.position is not None
    assert subscriber.blocks() == {}
    subscriber.call.cancel()


def test_who_comes_back_goes_on_from_there(rig: Rig, remote: GrpcClient) -> None:
    first = Subscriber(remote).begin()
    put(rig.store, chain(5))
    agree(rig, first)
    first.call.cancel()
    put(rig.store, chain(3, 1))
    rig.store.evict(chain(5))
    second = Subscriber(remote, first)
    agree(rig, second)
    assert set(second.blocks()["ram", NAMESPACE.fingerprint]) == set(chain(3, 1).keys)
    second.call.cancel()


def test_a_position_of_another_start_is_refused(remote: GrpcClient) -> None:
    subscriber = Subscriber(remote).begin()
    subscriber.call.cancel()
    assert subscriber.position is not None
    subscriber.position.epoch += 1
    error = refused(Subscriber(remote, subscriber))
    assert error.code() is grpc.StatusCode.OUT_OF_RANGE
    assert "another start" in str(error.details())
    subscriber.position.epoch -= 1
    subscriber.position.id += 1
    assert refused(Subscriber(remote, subscriber)).code() is grpc.StatusCode.OUT_OF_RANGE


@pytest.mark.parametrize("limits", [Limits(event_log_blocks=64)])
def test_who_is_away_for_too_long_needs_a_snapshot(rig: Rig, remote: GrpcClient) -> None:
    subscriber = Subscriber(remote).begin()
    subscriber.call.cancel()
    stir(rig, 50)
    error = refused(Subscriber(remote, subscriber))
    assert error.code() is grpc.StatusCode.OUT_OF_RANGE
    assert "take a snapshot" in str(error.details())
    again = Subscriber(remote)
    agree(rig, again)
    again.call.cancel()


@pytest.mark.parametrize("limits", [Limits(event_log_blocks=64)])
def test_who_reads_too_slowly_is_cut_off(rig: Rig, remote: GrpcClient) -> None:
    """What it has not read fills the connection, then the daemon waits, and nothing is queued."""
    slow = Subscriber(remote).begin()
    feed, names = rig.store.feed, count()
    for _ in range(4_000):  # 8 MB: more than any buffer between the two holds
        keys = [next(names).to_bytes(KEY_BYTES) for _ in range(60)]
        feed.append(Stored("ram", NAMESPACE.fingerprint, keys, keys))
    error = refused(slow)
    assert error.code() is grpc.StatusCode.OUT_OF_RANGE
    assert "take a snapshot" in str(error.details())


def test_many_subscribers_cost_a_writer_no_more_than_one(rig: Rig, remote: GrpcClient) -> None:
    subscribers = [Subscriber(remote).begin() for _ in range(20)]
    assert len(rig.store.feed._wakes) == 1
    put(rig.store, chain(5))
    for subscriber in subscribers:
        agree(rig, subscriber)
        subscriber.call.cancel()


def test_a_large_event_comes_in_parts(
    rig: Rig, remote: GrpcClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_events, "MESSAGE_BLOCKS", 7)
    subscriber = Subscriber(remote).begin()
    begun = subscriber.position
    put(rig.store, chain(20))
    for _ in range(2):
        assert subscriber.receive() == "stored"
        assert subscriber.position == begun  # it would go on in the middle
    assert subscriber.receive() == "stored"
    assert subscriber.position != begun
    agree(rig, subscriber)
    subscriber.call.cancel()


def test_the_end_of_the_store_is_told(rig: Rig, remote: GrpcClient) -> None:
    put(rig.store, chain(5))
    subscriber = Subscriber(remote)
    agree(rig, subscriber)
    rig.store.close()
    while subscriber.receive() != "cleared":
        pass
    assert subscriber.blocks() == {}
    with pytest.raises(StopIteration):
        subscriber.receive()


# ---- whose


def test_only_the_namespaces_asked_for(rig: Rig, remote: GrpcClient) -> None:
    stir(rig, 30)
    subscriber = Subscriber(remote, namespaces=[namespace(OTHER)])
    stir(rig, 50, seed=3)
    wanted = truth(rig, OTHER.fingerprint)
    assert wanted
    subscriber.until(lambda: subscriber.complete and subscriber.blocks() == wanted)
    subscriber.call.cancel()


def test_a_namespace_that_makes_no_sense_is_refused(remote: GrpcClient) -> None:
    nonsense = store_pb2.Namespace(model="m", hash_algorithm="md5")
    for asked in ([nonsense], [namespace(NAMESPACE)] * (grpc_events.NAMESPACES + 1)):
        error = refused(Subscriber(remote, namespaces=asked))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


class TestTenants:
    """A daemon with tokens: each tenant's blocks have names of the daemon's own."""

    @pytest.fixture
    def tenants(self) -> Tenants:
        def record(token: str, tenant: str, *rights: Right) -> TokenRecord:
            return TokenRecord(digest_of(token), tenant, frozenset(rights), None, 100)

        records = [
            record("red", "red", "read", "write"),
            record("blue", "blue", "read", "write"),
            record("writer", "blue", "write"),
            record("root", "ops", "admin"),
        ]
        return Tenants(records, secret=bytes(32))

    @pytest.fixture
    def clients(self, address: str) -> Iterator[Callable[[str], GrpcClient]]:
        made: list[GrpcClient] = []

        def client(token: str) -> GrpcClient:
            made.append(GrpcClient(address, token))
            return made[-1]

        yield client
        for each in made:
            each.close()

    def name(self, client: GrpcClient, blocks: Chain) -> pb.NameReply:
        stub: Any = events_pb2_grpc.EventsStub(client.channel)
        reply: pb.NameReply = client.ask(stub.Name, pb.NameRequest(chain=message(blocks)))
        return reply

    def test_a_tenant_sees_its_own_blocks_and_no_others(
        self, rig: Rig, clients: Callable[[str], GrpcClient]
    ) -> None:
        red, blue = clients("red"), clients("blue")
        mine, theirs = chain(5), chain(6, 1)
        red_sees = Subscriber(red, namespaces=[namespace(NAMESPACE)])
        blue_sees = Subscriber(blue, namespaces=[namespace(NAMESPACE)])
        assert red.put(mine) == 5
        assert blue.put(theirs) == 6
        put(rig.store, chain(7, 2))  # of this machine's user
        named, other = self.name(red, mine), self.name(blue, theirs)
        for sees, reply in ((red_sees, named), (blue_sees, other)):
            wanted = truth(rig, reply.fingerprint)
            while sees.blocks() != wanted:
                sees.receive()
            assert list(sees.blocks()["ram", reply.fingerprint]) == cut(reply.keys)
            assert reply.parent == reply.fingerprint
            sees.call.cancel()
        assert named.fingerprint != other.fingerprint
        assert not set(cut(named.keys)) & set(mine.keys)

    def test_another_tenant_cannot_be_named(
        self, rig: Rig, clients: Callable[[str], GrpcClient]
    ) -> None:
        red, blue = clients("red"), clients("blue")
        assert red.put(chain(5)) == 5
        (own,) = {used for used in rig.store.inventory.namespaces().values() if used.salt}
        spy = Subscriber(blue, namespaces=[namespace(own), namespace(NAMESPACE)])
        assert spy.receive() == "complete"
        assert blue.put(chain(2, 1)) == 2
        spy.until(lambda: sum(map(len, spy.blocks().values())) >= 2)
        assert {len(held) for held in spy.blocks().values()} == {2}
        spy.call.cancel()

    def test_all_is_for_those_who_run_the_daemon(
        self, rig: Rig, clients: Callable[[str], GrpcClient]
    ) -> None:
        red, root, writer = clients("red"), clients("root"), clients("writer")
        assert refused(Subscriber(red)).code() is grpc.StatusCode.PERMISSION_DENIED
        for client in (root, writer):
            named = Subscriber(client, namespaces=[namespace(NAMESPACE)])
            assert refused(named).code() is grpc.StatusCode.PERMISSION_DENIED
        assert red.put(chain(5)) == 5
        put(rig.store, chain(5))
        everything = Subscriber(root)
        agree(rig, everything)
        assert len(everything.blocks()) >= 2
        everything.call.cancel()
        with pytest.raises(grpc.RpcError) as denied:
            self.name(writer, chain(1))
        assert denied.value.code() is grpc.StatusCode.PERMISSION_DENIED

    def test_without_a_token_nothing_is_told(self, clients: Callable[[str], GrpcClient]) -> None:
        stranger = clients("nobody's")
        assert refused(Subscriber(stranger)).code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError) as unknown:
            self.name(stranger, chain(1))
        assert unknown.value.code() is grpc.StatusCode.UNAUTHENTICATED

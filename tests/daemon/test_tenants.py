"""Tenants of one daemon, one of whom lies about everything that a client can lie about."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvstore import wire
from kvstore.client.client import StoreClient
from kvstore.daemon.tokens import Tenants, TokenRecord, digest_of
from kvstore.errors import RightsError
from kvstore.hashing import Chain
from kvstore.retention import DEFAULT_PRIORITY, Retention
from kvstore.tenant import Right
from tests.daemon.data_doors import DataDaemon, RawClient
from tests.store.rig import BLOCK, NAMESPACE, PATIENCE_S, Rig, RunningClock, chain, get, put

VICTIM, THIEF, READER, OPERATOR = "kvs_victim", "kvs_thief", "kvs_reader", "kvs_operator"
QUOTA_BLOCKS, CAP = 10, 40
SECRET = bytes(range(32))


def record(token: str, tenant: str, *rights: Right, **limits: Any) -> TokenRecord:
    given = {"quota_bytes": None, "priority_cap": 100, **limits}
    return TokenRecord(digest_of(token), tenant, frozenset(rights), **given)


TENANTS = Tenants(
    [
        record(VICTIM, "victim", "read", "write"),
        record(READER, "victim", "read"),
        record(THIEF, "thief", "read", "write", quota_bytes=QUOTA_BLOCKS * BLOCK, priority_cap=CAP),
        record(OPERATOR, "operator", "read", "write", "admin"),
    ],
    SECRET,
)
VICTIMS, THIEFS = TENANTS.of(VICTIM), TENANTS.of(THIEF)


@pytest.fixture
def tenants_daemon(rig: Rig) -> Iterator[DataDaemon]:
    with DataDaemon(rig.store, TENANTS) as daemon:
        yield daemon


@pytest.fixture
def victim(tenants_daemon: DataDaemon) -> Iterator[StoreClient]:
    with tenants_daemon.connect(token=VICTIM) as client:
        yield client


@pytest.fixture
def thief(tenants_daemon: DataDaemon) -> Iterator[StoreClient]:
    with tenants_daemon.connect(token=THIEF) as client:
        yield client


@pytest.fixture
def raw_thief(tenants_daemon: DataDaemon) -> Iterator[RawClient]:
    with RawClient(tenants_daemon, THIEF) as raw:
        assert isinstance(raw.hear(), wire.Welcome)
        yield raw


def as_stored(blocks: Chain) -> Chain:
    """What the store knows the victim's chain as; a secret of the daemon's goes into it."""
    own = VICTIMS.namespace(blocks.namespace)
    return VICTIMS.chain(blocks.namespace, own, blocks.parent, blocks.keys)


def held_by(rig: Rig, blocks: Chain) -> int:
    """How many of a tenant's blocks, as it names them, the store has: only the thief's."""
    own = THIEFS.namespace(blocks.namespace)
    there = rig.store.probe(THIEFS.chain(blocks.namespace, own, blocks.parent, blocks.keys))
    return len(blocks) - there.tiers.count(None)


# ---- whose blocks are whose


def test_each_finds_its_own_and_nobody_elses(
    rig: Rig, victim: StoreClient, thief: StoreClient
) -> None:
    blocks = chain(5)
    assert put(victim, blocks) == 5
    assert get(victim, blocks) == 5
    assert thief.probe(blocks).prefix == 0
    assert get(thief, blocks) == 0
    assert thief.evict(blocks) == 0
    assert thief.prefetch(blocks) == 0
    assert thief.retain(blocks, Retention(40)).absent == 5
    assert put(thief, blocks) == 5  # a second copy, and the victim's is still its own
    assert thief.evict(blocks) == 5
    assert get(victim, blocks) == 5
    assert rig.store.probe(blocks).prefix == 0  # nor do local clients find it


def all_lies(blocks: Chain) -> list[Chain]:
    """Every way to name the victim's blocks that a client has."""
    stored = as_stored(blocks)
    salted = dataclasses.replace(NAMESPACE, salt=stored.namespace.salt)
    return [
        blocks,
        stored,
        Chain(blocks.namespace, stored.parent, stored.keys),
        Chain(salted, blocks.parent, blocks.keys),
        Chain(salted, salted.fingerprint, stored.keys),
        Chain(salted, stored.keys[0], stored.keys[1:]),
        Chain(blocks.namespace, blocks.keys[0], stored.keys[1:]),
    ]


@pytest.mark.parametrize("number", range(7))
def test_no_name_leads_to_another_tenants_blocks(
    rig: Rig, victim: StoreClient, raw_thief: RawClient, number: int
) -> None:
    """Salts, fingerprints, parents and keys, even those that only the daemon knows."""
    put(victim, chain(5))
    lie = all_lies(chain(5))[number]
    assert not any(raw_thief.about(wire.ProbeChain, lie).tiers)
    assert raw_thief.about(wire.Acquire, lie, 1.0).sources == b""
    assert raw_thief.about(wire.Evict, lie).count == 0
    assert raw_thief.about(wire.Prefetch, lie).count == 0
    assert raw_thief.about(wire.Retain, lie, 0, None).fields["absent"] == len(lie)
    explained = raw_thief.about(wire.Explain, lie).fields
    assert (explained["present"], explained["namespace_known"]) == (0, False)
    assert explained["nearest"] is None
    assert explained["differences"] == {}
    assert rig.store.probe(as_stored(chain(5))).prefix == 5


def test_what_a_thief_commits_is_served_to_nobody_else(
    rig: Rig, victim: StoreClient, raw_thief: RawClient
) -> None:
    for lie in all_lies(chain(5)):
        reserved = raw_thief.about(wire.Reserve, lie, 35, None)
        nbytes = BLOCK * len(reserved.indices) // 4
        if nbytes:
            raw_thief.say(wire.Commit(1 << 40, reserved.reservation, nbytes), b"\xee" * nbytes)
    assert get(victim, chain(5)) == 0
    assert put(victim, chain(5)) == 5
    assert get(victim, chain(5)) == 5


def test_numbers_of_others_leases_and_reservations_mean_nothing(
    rig: Rig, victim: StoreClient, raw_thief: RawClient
) -> None:
    rig_blocks = chain(5)
    put(victim, rig_blocks)
    with victim.reserve(chain(4, 1)) as reservation:
        for number in range(10):
            raw_thief.say(wire.Release(number))
            raw_thief.say(wire.Abort(number))
        assert isinstance(raw_thief.ask(wire.GetStats), wire.Answered)
        for view in reservation.views:
            view[:] = bytes(BLOCK)
        assert reservation.commit() == 4
    assert get(victim, rig_blocks) == 5


@pytest.mark.parametrize("namespace", [1, 2, 1 << 40])
def test_numbers_of_namespaces_are_each_clients_own(
    victim: StoreClient, raw_thief: RawClient, namespace: int
) -> None:
    put(victim, chain(2))
    keys = wire.pack_keys(chain(2).keys)
    answer = raw_thief.ask(wire.ProbeChain, namespace, NAMESPACE.fingerprint, keys)
    assert (answer.kind, "not opened" in answer.message) == ("RequestError", True)


# ---- what each may do


def test_rights_are_checked(tenants_daemon: DataDaemon, victim: StoreClient) -> None:
    put(victim, chain(2))
    with tenants_daemon.connect(token=READER) as reader:
        assert get(reader, chain(2)) == 2
        for forbidden in (
            lambda: reader.reserve(chain(2)),
            lambda: reader.evict(chain(2)),
            lambda: reader.retain(chain(2), Retention(50)),
            lambda: reader.ask(wire.GetStatus),
            lambda: reader.ask(wire.ListNamespaces),
            lambda: reader.ask(wire.EvictBlocks, keys=chain(2).keys[0]),
        ):
            with pytest.raises(RightsError):
                forbidden()
        assert get(reader, chain(2)) == 2


@pytest.mark.parametrize("token", ["", "kvs_", "kvs_nobody", VICTIM + "x", "x" * 4000, "\u00ff"])
def test_without_a_token_that_is_known_nobody_comes_in(
    tenants_daemon: DataDaemon, token: str
) -> None:
    with pytest.raises(RightsError, match="token"):
        tenants_daemon.connect(token=token)
    assert not tenants_daemon.service.sessions


def test_tokens_are_not_in_the_log(
    tenants_daemon: DataDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    with tenants_daemon.connect(token=VICTIM) as client:
        put(client, chain(1))
    with pytest.raises(RightsError):
        tenants_daemon.connect(token="kvs_wrong_one")
    assert "connected" in caplog.text
    assert VICTIM not in caplog.text
    assert "kvs_wrong_one" not in caplog.text


def test_statistics_are_each_tenants_own(
    tenants_daemon: DataDaemon, victim: StoreClient, thief: StoreClient
) -> None:
    put(victim, chain(5))
    get(victim, chain(6))
    put(thief, chain(2))
    get(thief, chain(4))
    tenants_daemon.until(lambda: tenants_daemon.service.tenant_blocks["thief"]["asked"] == 4)
    mine = thief.stats()
    assert (mine.ram, mine.nvme) == ({}, {})
    assert mine.hits == {"ram": 2}
    assert mine.misses == {"absent": 2}
    assert mine.counters["asked_blocks"] == 4
    assert mine.counters["held_bytes"] == 2 * BLOCK
    with tenants_daemon.connect(token=OPERATOR) as operator:
        assert operator.stats().ram["blocks"] == 7


def test_explain_names_a_tenants_own_namespaces(victim: StoreClient, thief: StoreClient) -> None:
    put(victim, chain(2))
    other = dataclasses.replace(NAMESPACE, adapter="lora")
    put(thief, chain(2, namespace=other))
    explained = thief.explain(chain(2))
    assert explained.nearest is not None
    assert set(explained.differences) == {"adapter"}
    assert victim.explain(chain(2, namespace=other)).differences["adapter"] == ("lora", "")


# ---- how much each may have


@pytest.mark.parametrize("priority", [CAP, CAP + 1, 100])
def test_the_cap_holds(rig: Rig, thief: StoreClient, priority: int) -> None:
    put(thief, chain(2), Retention(priority))
    own = THIEFS.chain(NAMESPACE, THIEFS.namespace(NAMESPACE), *chain_parts(chain(2)))
    assert rig.column("priority", own) == [CAP] * 2
    put(thief, chain(2, 1))
    thief.retain(chain(2, 1), Retention(priority, 60.0))
    own = THIEFS.chain(NAMESPACE, THIEFS.namespace(NAMESPACE), *chain_parts(chain(2, 1)))
    assert rig.column("priority", own) == [CAP] * 2


def chain_parts(blocks: Chain) -> tuple[Any, Any]:
    return blocks.parent, blocks.keys


def test_a_cap_below_the_default_holds_when_the_time_is_over() -> None:
    low = dataclasses.replace(THIEFS, priority_cap=10)
    granted = low.retention(Retention(100, ttl_s=0.001))
    assert (granted.priority, granted.ttl_s) == (10, None)
    assert THIEFS.retention(Retention(100, 5.0)) == Retention(CAP, 5.0)
    assert CAP > DEFAULT_PRIORITY


def test_a_tenant_makes_room_for_its_own(rig: Rig, victim: StoreClient, thief: StoreClient) -> None:
    put(victim, chain(20))
    for seed in range(1, 4):
        assert put(thief, chain(4, seed)) == 4
    assert thief.stats().counters["quota_evicted_blocks"] == 2
    assert [held_by(rig, chain(4, seed)) for seed in (1, 2, 3)] == [2, 4, 4]
    assert get(thief, chain(4, 1)) == 2  # the deepest went first
    assert get(victim, chain(20)) == 20


def test_what_was_used_stays(rig: Rig, tenants_daemon: DataDaemon, thief: StoreClient) -> None:
    put(thief, chain(5, 1))
    put(thief, chain(5, 2))
    get(thief, chain(5, 1))
    tenants_daemon.until(lambda: not rig.store.stats().ram["pinned_blocks"])
    put(thief, chain(5, 3))
    assert [held_by(rig, chain(5, seed)) for seed in (1, 2, 3)] == [5, 0, 5]


def test_more_than_the_quota_at_once_is_refused_and_counted(rig: Rig, thief: StoreClient) -> None:
    assert put(thief, chain(25)) == QUOTA_BLOCKS
    assert get(thief, chain(25)) == QUOTA_BLOCKS
    assert thief.stats().counters["quota_refused_blocks"] == 25 - QUOTA_BLOCKS
    assert put(thief, chain(25)) == 0


def test_reservations_count_from_the_first(tenants_daemon: DataDaemon) -> None:
    with (
        tenants_daemon.connect(token=THIEF) as one,
        tenants_daemon.connect(token=THIEF) as other,
        one.reserve(chain(7, 1)) as first,
        other.reserve(chain(7, 2)) as second,
    ):
        assert (len(first), len(second)) == (7, 3)
        first.abort()
        quota = tenants_daemon.service.quota_of(THIEFS)
        assert quota is not None
        tenants_daemon.until(lambda: quota.reserved_bytes == 3 * BLOCK)
        assert len(other.reserve(chain(7, 3))) == 7


def test_the_quota_spans_tiers_and_restarts(
    rig: Rig, tenants_daemon: DataDaemon, thief: StoreClient
) -> None:
    for seed in range(3):
        put(thief, chain(QUOTA_BLOCKS, seed))
        assert rig.store.flush(PATIENCE_S)
    assert sum(held_by(rig, chain(QUOTA_BLOCKS, seed)) for seed in range(3)) == QUOTA_BLOCKS
    thief.close()
    tenants_daemon.close()
    with DataDaemon(rig.store, TENANTS) as daemon, daemon.connect(token=THIEF) as again:
        assert again.stats().counters["held_bytes"] == QUOTA_BLOCKS * BLOCK
        assert put(again, chain(4, 7)) == 4
        there = [held_by(rig, chain(QUOTA_BLOCKS, seed)) for seed in range(3)]
        assert there == [0, 0, QUOTA_BLOCKS - 4]


Step = Callable[[random.Random, StoreClient], object]


def steps() -> list[Step]:
    def anything(rng: random.Random) -> Chain:
        return chain(rng.randint(1, 14), rng.randrange(6))

    return [
        lambda rng, client: put(client, anything(rng), Retention(rng.randrange(101))),
        lambda rng, client: put(client, anything(rng)),
        lambda rng, client: get(client, anything(rng)),
        lambda rng, client: client.evict(anything(rng)),
        lambda rng, client: client.reserve(anything(rng)).abort(),
        lambda rng, client: client.retain(anything(rng), Retention(rng.randrange(101), 1.0)),
    ]


@pytest.mark.parametrize("seed", range(3))
def test_quota_and_cap_hold_whatever_is_done(
    rig: Rig, tenants_daemon: DataDaemon, victim: StoreClient, seed: int
) -> None:
    """And the victim's blocks, which are few and firmly kept, are all there at the end."""
    rng = random.Random(seed)
    put(victim, chain(20, 99), Retention(100))
    with (
        tenants_daemon.connect(token=THIEF) as one,
        tenants_daemon.connect(token=THIEF) as other,
    ):
        for _ in range(60):
            rng.choice(steps())(rng, rng.choice((one, other)))
            own = THIEFS.namespace(NAMESPACE).fingerprint
            held = held_keys(rig, own)
            assert len(held) <= QUOTA_BLOCKS
            quota = tenants_daemon.service.quota_of(THIEFS)
            assert quota is not None
            assert len(held) * BLOCK <= quota.held_bytes <= QUOTA_BLOCKS * BLOCK
            assert highest_priority(rig, own) <= CAP
    assert get(victim, chain(20, 99)) == 20


def held_keys(rig: Rig, fingerprint: bytes) -> set[bytes]:
    """Of a namespace, over both tiers, from their own tables."""
    rows = [rig.store.inventory.page(tier).rows for tier in ("ram", "nvme")]
    return {
        row["key"].tobytes()
        for page in rows
        for row in page
        if row["namespace"].tobytes() == fingerprint
    }


def highest_priority(rig: Rig, fingerprint: bytes) -> int:
    index, slots = rig.ram.slots.index, rig.ram.slots
    with rig.hub.lock:
        rows = [row for row in index.rows_by_key.values() if slots.namespace(row) == fingerprint]
        return max((index.priority.item(row) for row in rows), default=0)


def test_pins_are_no_way_around_the_quota(tmp_path: Any) -> None:
    large = dataclasses.replace(NAMESPACE, layers=128)
    size = large.layout.block_bytes
    tenants = Tenants([record(THIEF, "thief", "read", "write", quota_bytes=24 * size)], SECRET)
    rig = Rig(None, ram_blocks=64 * size // BLOCK, clock=RunningClock())
    with (
        DataDaemon(rig.store, tenants) as daemon,
        daemon.connect(token=THIEF) as client,
        RawClient(daemon, THIEF) as reader,
    ):
        put(client, chain(24, namespace=large))
        reader.hear()
        reader.about(wire.Acquire, chain(24, namespace=large))  # and takes nothing
        with client.reserve(chain(24, 1, large)) as reservation:
            assert rig.store.stats().ram["pinned_blocks"] > 0
            assert rig.store.stats().ram["used_bytes"] <= 24 * size
            assert len(reservation) < 24
    rig.finish()

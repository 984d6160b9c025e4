"""A tenant who lies about everything that a client can lie about, and the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from kvstore import wire
from kvstore.client.client import StoreClient
from kvstore.errors import RightsError
from kvstore.hashing import Chain
from kvstore.retention import Retention
from tests.daemon.data_doors import DataDaemon, RawClient
from tests.daemon.tenants import OPERATOR, READER, THIEF, VICTIM, as_stored
from tests.store.rig import BLOCK, NAMESPACE, Rig, chain, get, put


@pytest.fixture
def raw_thief(tenants_daemon: DataDaemon) -> Iterator[RawClient]:
    with RawClient(tenants_daemon, THIEF) as raw:
        assert isinstance(raw.hear(), wire.Welcome)
        yield raw


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
            lambda: reader.flush(0.0),
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

"""How much a tenant may hold, and how firmly, whatever it does."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from kvstore import wire
from kvstore.allocator import ALIGN_BYTES
from kvstore.client.client import StoreClient
from kvstore.daemon import quota
from kvstore.daemon.service import Limits
from kvstore.daemon.tokens import Tenants
from kvstore.hashing import Chain
from kvstore.retention import DEFAULT_PRIORITY, Retention
from tests.daemon.data_doors import DataDaemon, RawClient
from tests.daemon.tenants import (
    CAP,
    QUOTA_BLOCKS,
    SECRET,
    TENANTS,
    THIEF,
    THIEFS,
    held_by,
    record,
)
from tests.store.rig import BLOCK, NAMESPACE, PATIENCE_S, Rig, RunningClock, chain, get, put


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


def test_what_can_never_fit_evicts_nothing(rig: Rig, thief: StoreClient) -> None:
    put(thief, chain(QUOTA_BLOCKS))
    huge = dataclasses.replace(NAMESPACE, layers=QUOTA_BLOCKS + 1)
    assert put(thief, chain(2, namespace=huge)) == 0
    assert held_by(rig, chain(QUOTA_BLOCKS)) == QUOTA_BLOCKS


def test_small_blocks_count_as_what_they_take(rig: Rig, thief: StoreClient) -> None:
    small = dataclasses.replace(NAMESPACE, head_dim=1)
    slots = QUOTA_BLOCKS * BLOCK // ALIGN_BYTES
    assert small.layout.block_bytes < ALIGN_BYTES
    assert put(thief, chain(2 * slots, namespace=small)) == slots
    assert get(thief, chain(slots, namespace=small)) == slots
    assert rig.store.stats().ram["used_bytes"] == QUOTA_BLOCKS * BLOCK


def test_a_tenant_fills_no_memory_with_namespaces(
    rig: Rig, thief: StoreClient, victim: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    salted = [dataclasses.replace(NAMESPACE, salt=str(number)) for number in range(5)]
    monkeypatch.setattr(quota, "RECORDS_BYTES", 3 * len(THIEFS.namespace(NAMESPACE).to_json()))
    stored = [put(thief, chain(2, namespace=each)) for each in salted + salted]
    assert stored == [2, 2, 2] + [0] * 7
    assert [get(thief, chain(2, namespace=each)) for each in salted] == [2, 2, 2, 0, 0]
    assert put(victim, chain(2, namespace=salted[4])) == 2
    assert len(rig.store.inventory.namespaces()) == 4


@pytest.mark.parametrize("limits", [Limits(in_flight_bytes=3 * ALIGN_BYTES)])
def test_and_so_they_do_in_flight(rig: Rig, client: StoreClient) -> None:
    small = dataclasses.replace(NAMESPACE, head_dim=1)
    put(rig.store, chain(5, namespace=small))
    assert get(client, chain(5, namespace=small)) == 3
    with client.reserve(chain(5, 1, small)) as reservation:
        assert len(reservation) == 3


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

"""As test_conformance: what every store says of itself, keeps, drops and refuses."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

import pytest

from kvstore.errors import ClosedError, RequestError
from kvstore.hashing import Chain
from kvstore.retention import DEFAULT_PRIORITY, Retention
from kvstore.tier import Miss
from kvstore.verbs import Store
from tests.daemon.subjects import NEAR, right, seen
from tests.store.rig import (
    BLOCK,
    NAMESPACE,
    PATIENCE_S,
    Rig,
    chain,
    check_bytes,
    get,
    put,
    stats_add_up,
)

# ---- keeping and dropping


def test_retentions_say_what_became_of_them(store: Store, rig: Rig) -> None:
    put(rig.store, chain(4))
    assert store.retain(chain(6), Retention(80, ttl_s=60.0)) == (4, 0, 0, 2, 80, 60.0)
    assert rig.column("priority", chain(4)) == [80] * 4
    assert store.retain(chain(2), Retention(80, ttl_s=1e8)) == ((0, 2, 0, 0, 80, 7 * 86_400.0))
    rig.hub.bounds = dataclasses.replace(rig.hub.bounds, protected_bytes=5 * BLOCK)
    put(rig.store, chain(2, seed=1))
    assert store.retain(chain(2, seed=1), Retention(80)) == (1, 0, 1, 0, 80, None)


def test_a_reservation_with_a_retention(store: Store, rig: Rig) -> None:
    assert put(store, chain(2), Retention(70)) == 2
    assert put(store, chain(2, seed=1)) == 2
    assert rig.column("priority", chain(2)) == [70] * 2
    assert rig.column("priority", chain(2, seed=1)) == [DEFAULT_PRIORITY] * 2


def test_evicted_blocks_are_gone_from_every_tier(store: Store, rig: Rig) -> None:
    blocks = chain(6)
    put(rig.store, blocks)
    assert store.flush(PATIENCE_S)
    rig.drop_from_ram(blocks.slice(4))
    assert store.evict(blocks.slice(2)) == 4
    assert store.probe(blocks).tiers == seen(store, ["ram", "ram", None, None, None, None])
    rig.until(rig.is_quiet)
    assert rig.nvme.peek(blocks.keys) == [True] * 2 + [False] * 4
    assert store.evict(blocks.slice(2)) == 0


@NEAR
def test_a_leased_block_is_not_evicted_from_under_its_reader(store: Store, rig: Rig) -> None:
    blocks = chain(3)
    put(rig.store, blocks)
    assert store.flush(PATIENCE_S)
    with store.acquire(blocks) as lease:
        assert store.evict(blocks) == 0
        assert check_bytes(lease, blocks) == 3
    assert store.evict(blocks) == 3


def test_evicted_while_on_its_way(store: Store, rig: Rig) -> None:
    blocks = chain(3)
    rig.store_below(blocks)
    rig.gate.hold("read")
    with store.acquire(blocks) as lease:
        rig.gate.arrived("read")
        assert store.evict(blocks.slice(1)) == 2
        rig.gate.release()
        assert lease.wait() == check_bytes(lease, blocks) == 1
        assert lease.miss is Miss.EVICTED


def test_what_is_flushed_is_on_nvme(store: Store, rig: Rig) -> None:
    rig.gate.hold("write")
    put(store, chain(4))
    assert not store.flush(0.01)
    assert rig.nvme.peek(chain(4).keys) == [False] * 4
    rig.gate.release()
    assert store.flush()
    assert rig.nvme.peek(chain(4).keys) == [True] * 4


def test_what_is_prefetched_is_in_ram(store: Store, rig: Rig) -> None:
    rig.store_below(chain(4))
    assert store.prefetch(chain(6)) == 4
    rig.until(rig.is_quiet)
    assert store.prefetch(chain(6)) == 0
    assert rig.store.probe(chain(6)).tiers == ["ram"] * 4 + [None] * 2


# ---- answers


def test_explanations(store: Store, rig: Rig) -> None:
    other = dataclasses.replace(NAMESPACE, model="other")
    assert store.explain(chain(2)).nearest is None
    put(rig.store, chain(3))
    for blocks in (chain(3), chain(5), chain(2, namespace=other)):
        assert store.explain(blocks) == rig.store.explain(blocks)
    assert store.explain(chain(2, namespace=other)).differences == {"model": ("other", "tiny")}


def test_stats_are_those_of_the_store(store: Store, rig: Rig) -> None:
    put(store, chain(5))
    get(store, chain(7))
    assert store.flush(PATIENCE_S)
    assert store.stats() == rig.store.stats()
    stats_add_up(store, 7)


@NEAR
def test_what_loading_costs(store: Store, rig: Rig) -> None:
    for seed in range(4):
        rig.store_below(chain(8, seed))
        get(store, chain(8, seed))
    theirs = rig.store.load_costs["nvme"]
    measured = rig.run_in_background(_until(lambda: theirs.observations == 4))
    assert measured
    store.probe(chain(1))
    ours = store.load_costs["nvme"]
    assert ours.observations == 4
    assert ours.coefficients() == theirs.coefficients()
    rig.store_below(chain(3))
    rig.gate.hold("read")
    store.prefetch(chain(3))
    rig.gate.arrived("read")
    store.probe(chain(3))
    assert store.queued_bytes() == {"nvme": 3 * BLOCK}


def test_another_namespace_is_served_nothing(store: Store, rig: Rig) -> None:
    put(rig.store, chain(3))
    other = dataclasses.replace(NAMESPACE, model="other")
    with store.acquire(Chain(other, other.fingerprint, chain(3).keys)) as lease:
        assert (len(lease), lease.miss) == (0, Miss.IDENTITY)


def test_blocks_of_two_sizes(store: Store, rig: Rig) -> None:
    wide = dataclasses.replace(NAMESPACE, head_dim=3 * 64)
    for blocks in (chain(4), chain(4, namespace=wide)):
        assert put(store, blocks) == 4
    for blocks in (chain(4), chain(4, namespace=wide)):
        assert get(store, blocks) == 4


# ---- refusing and ending


def test_a_retention_that_makes_no_sense() -> None:
    for priority, ttl_s in ((-1, None), (101, None), (50, 0.0), (50, float("nan"))):
        with pytest.raises(RequestError):
            Retention(priority, ttl_s)


def test_a_closed_store_does_nothing(store: Store) -> None:
    put(store, chain(2))
    store.close()
    store.close()
    one = chain(1)
    verbs: list[Callable[[], object]] = [
        lambda: store.probe(one),
        lambda: store.acquire(one),
        lambda: store.reserve(one),
        lambda: store.prefetch(one),
        lambda: store.retain(one, Retention()),
        lambda: store.evict(one),
        lambda: store.explain(one),
        store.stats,
        store.flush,
    ]
    for verb in verbs:
        with pytest.raises(ClosedError, match="closed"):
            verb()


@NEAR
def test_a_lease_outlives_its_store(store: Store, rig: Rig) -> None:
    put(rig.store, chain(2))
    lease = store.acquire(chain(2))
    views = lease.views
    store.close()
    assert [bytes(view) for view in views] == right(chain(2))
    lease.release()


async def _until(condition: Callable[[], bool]) -> bool:
    """Let the loop go on until the condition holds: what it waits for is a few turns away."""
    for _ in range(1000):
        if condition():
            return True
        await asyncio.sleep(0)
    return False

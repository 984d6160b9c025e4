"""What each verb does when all is well."""

from __future__ import annotations

import asyncio
import dataclasses
import gc

import pytest

from kvstore.errors import ClosedError
from kvstore.hashing import Chain
from kvstore.lease import Lease
from kvstore.tier import Miss
from tests.store.conftest import MakeRig
from tests.store.rig import (
    BLOCK,
    NAMESPACE,
    PATIENCE_S,
    Rig,
    chain,
    check_bytes,
    content,
    fill,
    get,
    put,
    stats_add_up,
    used,
)


def test_what_was_put_is_got(rig: Rig) -> None:
    blocks = chain(5)
    assert put(rig.store, blocks) == 5
    assert get(rig.store, blocks) == 5
    assert used(rig.store.stats().hits) == {"ram": 5}


def test_what_left_ram_comes_back_from_nvme(rig: Rig) -> None:
    blocks = chain(5)
    rig.store_below(blocks)
    with rig.store.acquire(blocks) as lease:
        assert len(lease) == 5
        assert lease.wait() == 5
        assert lease.sources == ["nvme"] * 5
        assert check_bytes(lease, blocks) == 5
    assert set(rig.store.probe(blocks).tiers) == {"ram"}
    assert used(rig.store.stats().hits) == {"nvme": 5}


def test_a_lease_is_over_both_tiers(rig: Rig) -> None:
    blocks = chain(6)
    rig.store_below(blocks)
    put(rig.store, blocks.slice(0, 2))
    with rig.store.acquire(blocks) as lease:
        assert lease.wait() == 6
        assert lease.sources == ["ram"] * 2 + ["nvme"] * 4
        check_bytes(lease, blocks)


def test_only_the_leading_blocks_are_leased(rig: Rig) -> None:
    blocks = chain(6)
    put(rig.store, blocks.slice(0, 2))
    put(rig.store, blocks.slice(3))
    with rig.store.acquire(blocks) as lease:
        assert len(lease) == lease.ready() == 2
        assert lease.miss is Miss.ABSENT
    assert rig.store.probe(blocks).tiers == ["ram", "ram", None, "ram", "ram", "ram"]
    assert rig.store.probe(blocks).prefix == 2


def test_a_whole_lease_has_no_miss(rig: Rig) -> None:
    put(rig.store, chain(3))
    with rig.store.acquire(chain(3)) as lease:
        assert lease.miss is None


def test_an_empty_chain(rig: Rig) -> None:
    none = chain(0)
    assert put(rig.store, none) == 0
    assert get(rig.store, none) == 0
    assert rig.store.probe(none).tiers == []
    assert rig.store.prefetch(none) == rig.store.evict(none) == 0
    assert rig.store.explain(none).breaks_at is None


def test_probe_has_no_side_effect(rig: Rig) -> None:
    blocks = chain(4)
    rig.store_below(blocks)
    before = rig.store.stats()
    for _ in range(3):
        rig.store.probe(blocks)
        rig.store.explain(blocks)
    assert rig.store.stats() == before
    assert rig.gate.calls["read"] == 0


def test_nothing_is_visible_before_commit(rig: Rig) -> None:
    blocks = chain(3)
    with rig.store.reserve(blocks) as reservation:
        fill(reservation.views, blocks.keys)
        assert rig.store.probe(blocks).tiers == [None] * 3
        assert len(rig.store.acquire(blocks)) == 0
        assert reservation.commit() == 3
    assert rig.store.probe(blocks).tiers == ["ram"] * 3


def test_reserve_is_for_what_is_not_held(rig: Rig) -> None:
    blocks = chain(6)
    put(rig.store, blocks.slice(1, 3))
    with rig.store.reserve(blocks) as reservation:
        assert reservation.indices == [0, 3, 4, 5]
        assert [len(view) for view in reservation.views] == [BLOCK] * 4
        assert len(reservation) == 4


def test_an_aborted_reservation_leaves_no_trace(rig: Rig) -> None:
    blocks = chain(3)
    free_bytes = rig.ram.slots.space.free_bytes
    reservation = rig.store.reserve(blocks)
    assert rig.ram.slots.space.free_bytes == free_bytes - 3 * BLOCK
    reservation.abort()
    reservation.abort()
    assert rig.ram.slots.space.free_bytes == free_bytes
    with pytest.raises(ClosedError):
        reservation.commit()
    with pytest.raises(ClosedError):
        reservation.views  # noqa: B018


def test_leaving_the_with_block_aborts_what_was_not_committed(rig: Rig) -> None:
    free_bytes = rig.ram.slots.space.free_bytes
    with pytest.raises(KeyError), rig.store.reserve(chain(3)):
        raise KeyError
    assert rig.ram.slots.space.free_bytes == free_bytes


def test_a_reservation_is_committed_once(rig: Rig) -> None:
    with rig.store.reserve(chain(2)) as reservation:
        fill(reservation.views, chain(2).keys)
        reservation.commit()
        with pytest.raises(ClosedError, match="committed or aborted"):
            reservation.commit()
    assert rig.store.probe(chain(2)).tiers == ["ram"] * 2


def test_a_lease_holds_its_blocks_against_pressure(ram_rig: Rig) -> None:
    held = chain(10, seed=1)
    put(ram_rig.store, held)
    with ram_rig.store.acquire(held) as lease:
        for seed in range(2, 12):
            put(ram_rig.store, chain(20, seed))
        assert check_bytes(lease, held) == 10
    for seed in range(2, 12):
        put(ram_rig.store, chain(20, seed))
    assert ram_rig.store.probe(held).tiers == [None] * 10


def test_a_released_lease_has_no_views(rig: Rig) -> None:
    put(rig.store, chain(2))
    lease = rig.store.acquire(chain(2))
    lease.release()
    lease.release()
    with pytest.raises(ClosedError, match="released"):
        lease.views  # noqa: B018
    stats_add_up(rig.store, 2)


def test_a_lost_lease_gives_its_pins_back(ram_rig: Rig) -> None:
    put(ram_rig.store, chain(4))
    lease = ram_rig.store.acquire(chain(4))
    assert ram_rig.store.stats().ram["pinned_blocks"] == 4
    del lease
    gc.collect()
    with ram_rig.store.acquire(chain(1, seed=9)):
        pass
    assert ram_rig.store.stats().ram["pinned_blocks"] == 0
    stats_add_up(ram_rig.store, 5)


def test_a_lost_lease_lets_go_of_what_is_still_coming(rig: Rig) -> None:
    rig.store_below(chain(4))
    rig.gate.hold("read")
    lease = rig.store.acquire(chain(4))
    rig.gate.arrived("read")
    del lease
    gc.collect()
    rig.hub.settle_orphans()
    rig.gate.release()
    rig.until(rig.is_quiet)
    assert rig.store.stats().misses == {"too_slow": 4}


def test_a_lost_reservation_gives_its_slots_back(ram_rig: Rig) -> None:
    free_bytes = ram_rig.ram.slots.space.free_bytes
    reservation = ram_rig.store.reserve(chain(4))
    del reservation
    gc.collect()
    ram_rig.store.prefetch(chain(1))
    assert ram_rig.ram.slots.space.free_bytes == free_bytes


def test_awaiting_a_lease(rig: Rig) -> None:
    rig.store_below(chain(4))
    rig.store_below(chain(4, seed=1))

    rig.gate.hold("read")

    async def both() -> list[int]:
        with rig.store.acquire(chain(4)) as one, rig.store.acquire(chain(4, seed=1)) as two:
            tasks = [asyncio.ensure_future(_awaited(lease)) for lease in (one, two)]
            while len(rig.hub.listeners) < 2:
                await asyncio.sleep(0)
            rig.gate.release()
            return await asyncio.gather(*tasks)

    assert asyncio.run(both()) == [4, 4]
    assert not rig.hub.listeners


def test_awaiting_a_lease_that_is_ready(ram_rig: Rig) -> None:
    put(ram_rig.store, chain(2))

    async def wait() -> int:
        with ram_rig.store.acquire(chain(2)) as lease:
            return await lease

    assert asyncio.run(wait()) == 2


def test_an_awaiting_task_can_be_cancelled(rig: Rig) -> None:
    rig.store_below(chain(2))
    rig.gate.hold("read")

    async def give_up() -> None:
        with rig.store.acquire(chain(2)) as lease:
            task = asyncio.ensure_future(_awaited(lease))
            while not rig.hub.listeners:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(give_up())
    assert not rig.hub.listeners


async def _awaited(lease: Lease) -> int:
    return await lease


def test_evicted_blocks_are_gone_from_every_tier(rig: Rig) -> None:
    blocks = chain(6)
    put(rig.store, blocks)
    assert rig.store.flush(PATIENCE_S)
    rig.drop_from_ram(blocks.slice(4))
    assert rig.store.evict(blocks.slice(2)) == 4
    assert rig.store.probe(blocks).tiers == ["ram", "ram", None, None, None, None]
    rig.until(rig.is_quiet)
    assert rig.nvme.peek(blocks.keys) == [True] * 2 + [False] * 4
    assert rig.store.evict(blocks.slice(2)) == 0


def test_a_leased_block_is_not_evicted_from_under_its_reader(rig: Rig) -> None:
    blocks = chain(3)
    put(rig.store, blocks)
    assert rig.store.flush(PATIENCE_S)
    with rig.store.acquire(blocks) as lease:
        assert rig.store.evict(blocks) == 0
        assert rig.store.probe(blocks).tiers == ["ram"] * 3
        assert check_bytes(lease, blocks) == 3
    assert rig.store.evict(blocks) == 3
    rig.until(rig.is_quiet)
    assert rig.nvme.peek(blocks.keys) == [False] * 3


def test_a_chain_that_names_a_block_twice(rig: Rig) -> None:
    """No honest chain does, but one that came over a wire might."""
    once = chain(2)
    twice = dataclasses.replace(once, keys=once.keys * 2)
    assert put(rig.store, twice) == 2
    assert get(rig.store, twice) == 4
    assert rig.store.flush(PATIENCE_S)
    rig.drop_from_ram(once)
    assert rig.store.prefetch(twice) == 2
    assert get(rig.store, twice) == 4
    assert rig.store.evict(twice) == 2
    rig.store_below(once)
    assert get(rig.store, twice) == 4
    stats_add_up(rig.store, 12)


def test_a_key_is_not_served_to_another_namespace(rig: Rig) -> None:
    blocks = chain(3)
    rig.store_below(blocks.slice(2))
    put(rig.store, blocks.slice(0, 2))
    other = dataclasses.replace(NAMESPACE, model="other")
    stolen = Chain(other, other.fingerprint, blocks.keys)
    with rig.store.acquire(stolen) as lease:
        assert len(lease) == 0
        assert lease.miss is Miss.IDENTITY
    tail = Chain(other, blocks.keys[1], blocks.keys[2:])
    with rig.store.acquire(tail) as lease:
        assert lease.wait() == 0
        assert lease.miss is Miss.IDENTITY
    # While the right reader has it on the way, the wrong one does not get it either.
    rig.gate.hold("read")
    with rig.store.acquire(blocks) as right, rig.store.acquire(tail) as wrong:
        rig.gate.release()
        assert wrong.wait() == 0
        assert wrong.miss is Miss.IDENTITY
        assert right.wait() == 3
    stats_add_up(rig.store, 8)


def test_a_block_of_another_size_is_not_served(ram_rig: Rig) -> None:
    blocks = chain(1)
    put(ram_rig.store, blocks)
    wide = dataclasses.replace(NAMESPACE, head_dim=128)
    with ram_rig.store.acquire(Chain(wide, wide.fingerprint, blocks.keys)) as lease:
        assert len(lease) == 0
        assert lease.miss is Miss.IDENTITY


def test_blocks_of_two_sizes_share_the_arena(make_rig: MakeRig) -> None:
    rig = make_rig(ram_blocks=32)
    wide = dataclasses.replace(NAMESPACE, head_dim=3 * 64)
    for seed in range(8):
        small, large = chain(7, seed), chain(4, seed, wide)
        assert put(rig.store, small) == 7
        assert put(rig.store, large) == 4
        assert get(rig.store, small) == 7
        assert get(rig.store, large) == 4
        assert rig.store.flush(PATIENCE_S)
        rig.store.check_invariants()


def test_content_is_of_its_own_for_each_key() -> None:
    """What all byte comparisons here lean on."""
    keys = chain(50).keys
    assert len({content(key) for key in keys}) == 50

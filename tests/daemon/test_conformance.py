"""What every store must do, in this process or over a door. A new door adds one line to `SUBJECTS`.

The store is reached behind the back of what is tested: what is put through a subject is
looked for in the tiers themselves, and what is got was put there without it.
"""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from kvstore.errors import ClosedError
from kvstore.retention import Retention
from kvstore.tier import Miss
from kvstore.verbs import Lease, Store
from tests.daemon.subjects import NEAR, damage, is_near, pinned, put_behind, right, seen, stored
from tests.store.rig import (
    BLOCK,
    PATIENCE_S,
    Rig,
    chain,
    check_bytes,
    fill,
    get,
    put,
    stats_add_up,
    used,
)

# ---- writing


def test_what_is_put_is_in_the_arena(store: Store, rig: Rig) -> None:
    blocks = chain(5)
    assert put(store, blocks) == 5
    assert stored(rig, blocks) == right(blocks)


def test_nothing_is_visible_before_commit(store: Store, rig: Rig) -> None:
    blocks = chain(3)
    with store.reserve(blocks) as reservation:
        fill(reservation.views, blocks.keys)
        assert rig.store.probe(blocks).tiers == store.probe(blocks).tiers == [None] * 3
        assert reservation.commit() == 3
    assert rig.store.probe(blocks).tiers == ["ram"] * 3
    assert store.probe(blocks).tiers == seen(store, ["ram"] * 3)


def test_slots_are_for_what_is_not_held(store: Store, rig: Rig) -> None:
    blocks = chain(6)
    put(rig.store, blocks.slice(1, 3))
    with store.reserve(blocks) as reservation:
        assert reservation.indices == [0, 3, 4, 5]
        assert [len(view) for view in reservation.views] == [BLOCK] * 4
        assert not any(view.readonly for view in reservation.views)
        assert len(reservation) == 4


def test_the_first_commit_wins(store: Store, rig: Rig) -> None:
    blocks = chain(4)
    with store.reserve(blocks) as late, rig.store.reserve(blocks.slice(0, 2)) as first:
        fill(first.views, blocks.keys[:2])
        assert first.commit() == 2
        for view in late.views:
            view[:] = b"\xee" * BLOCK
        assert late.commit() == 2
    assert stored(rig, blocks.slice(0, 2)) == right(blocks.slice(0, 2))
    assert rig.ram.slots.space.used_bytes == 4 * BLOCK


@pytest.mark.parametrize("committed", [False, True])
def test_a_reservation_ends_once(store: Store, rig: Rig, committed: bool) -> None:
    blocks = chain(3)
    reservation = store.reserve(blocks)
    assert rig.ram.slots.space.used_bytes == 3 * BLOCK
    if committed:
        fill(reservation.views, blocks.keys)
        assert reservation.commit() == 3
    reservation.abort()
    reservation.abort()
    with pytest.raises(ClosedError, match="committed or aborted"):
        reservation.commit()
    with pytest.raises(ClosedError, match="committed or aborted"):
        reservation.views  # noqa: B018
    assert store.probe(blocks).prefix == 3 * committed
    assert rig.ram.slots.space.used_bytes == 3 * BLOCK * committed


def test_leaving_the_with_block_aborts(store: Store, rig: Rig) -> None:
    with pytest.raises(KeyError), store.reserve(chain(3)):
        raise KeyError
    store.probe(chain(1))
    assert rig.ram.slots.space.used_bytes == 0


def test_a_lost_reservation_gives_its_slots_back(store: Store, rig: Rig) -> None:
    reservation = store.reserve(chain(4))
    assert rig.ram.slots.space.used_bytes == 4 * BLOCK
    del reservation
    gc.collect()
    store.prefetch(chain(1))
    store.prefetch(chain(1))
    assert rig.ram.slots.space.used_bytes == 0


def test_a_full_store_reserves_what_it_can(store: Store, rig: Rig) -> None:
    held = chain(60, seed=1)
    put(rig.store, held)
    with rig.store.acquire(held) as pins:  # a client elsewhere pins only until it has the bytes
        assert pins.wait() == 60
        assert store.reserve(chain(10)).indices == [0, 1, 2, 3]
    stats_add_up(store, 60)


# ---- reading


@NEAR
def test_what_is_in_the_arena_is_got(store: Store, rig: Rig) -> None:
    blocks = chain(5)
    put_behind(rig, blocks)
    with store.acquire(blocks) as lease:
        assert len(lease) == lease.ready() == lease.wait() == 5
        assert lease.sources == seen(store, ["ram"] * 5)
        assert lease.miss is None
        assert [bytes(view) for view in lease.views] == right(blocks)
        assert all(view.readonly for view in lease.views)
        assert pinned(rig) == 5
    store.probe(blocks)
    assert pinned(rig) == 0
    assert used(store.stats().hits) == {"ram": 5}


def test_what_is_on_nvme_is_got(store: Store, rig: Rig) -> None:
    blocks = chain(5)
    rig.store_below(blocks)
    assert store.probe(blocks).tiers == seen(store, ["nvme"] * 5)
    with store.acquire(blocks) as lease:
        assert lease.wait() == 5
        assert lease.sources == seen(store, ["nvme"] * 5)
        assert check_bytes(lease, blocks) == 5
    assert store.probe(blocks).tiers == seen(store, ["ram"] * 5)
    stats_add_up(store, 5)
    assert used(store.stats().hits) == {"nvme": 5}


def test_a_lease_over_both_tiers_fills_as_blocks_arrive(store: Store, rig: Rig) -> None:
    blocks = chain(6)
    rig.store_below(blocks)
    put(rig.store, blocks.slice(0, 2))
    rig.gate.hold("read")
    with store.acquire(blocks.slice(0, 4)) as lease, store.acquire(blocks) as longer:
        rig.gate.arrived("read")
        assert len(lease) == 4
        assert lease.wait(2) == lease.ready() == len(lease.views) == 2
        assert lease.wait(timeout_s=0.0) == 2
        assert lease.sources == seen(store, ["ram"] * 2 + ["nvme"] * 2)
        check_bytes(lease, blocks)
        rig.gate.release()
        assert lease.wait() == lease.ready() == len(lease.views) == 4
        assert longer.wait(5) >= 5
        check_bytes(lease, blocks)
        assert longer.wait() == check_bytes(longer, blocks) == 6


@NEAR
def test_only_the_leading_blocks_are_leased(store: Store, rig: Rig) -> None:
    blocks = chain(6)
    put(rig.store, blocks.slice(0, 2))
    put(rig.store, blocks.slice(3))
    with store.acquire(blocks) as lease:
        assert len(lease) == lease.ready() == 2
        assert lease.miss is Miss.ABSENT
    assert store.probe(blocks).tiers == seen(store, ["ram", "ram", None, "ram", "ram", "ram"])
    assert store.probe(blocks).prefix == 2
    assert used(store.stats().misses) == {"absent": 4}


def test_an_empty_chain(store: Store) -> None:
    none = chain(0)
    assert put(store, none) == 0
    assert get(store, none) == 0
    assert store.probe(none).tiers == []
    assert store.prefetch(none) == store.evict(none) == 0
    assert store.explain(none).breaks_at is None
    assert sum(store.retain(none, Retention(50))[:4]) == 0


def test_nothing_is_leased_where_there_is_nothing(store: Store, rig: Rig) -> None:
    with store.acquire(chain(3)) as lease:
        assert (len(lease), lease.ready(), lease.wait()) == (0, 0, 0)
        assert (lease.views, lease.sources, lease.miss) == ([], [], Miss.ABSENT)
    with pytest.raises(ClosedError, match="released"):
        lease.views  # noqa: B018
    stats_add_up(store, 3)


def test_a_lease_holds_its_blocks_against_pressure(store: Store, rig: Rig) -> None:
    held = chain(10, seed=1)
    put(rig.store, held)
    with store.acquire(held) as lease:
        assert lease.wait() == 10
        for seed in range(2, 12):
            put(rig.store, chain(20, seed))
        assert check_bytes(lease, held) == 10


@NEAR
@pytest.mark.parametrize("ready", [0, 2])
def test_a_released_lease_has_no_views(store: Store, rig: Rig, ready: int) -> None:
    blocks = chain(4)
    rig.store_below(blocks)
    put(rig.store, blocks.slice(0, ready))
    rig.gate.hold("read")
    lease = store.acquire(blocks)
    rig.gate.arrived("read")
    lease.release()
    lease.release()
    store.probe(blocks)  # a daemon has heard of the release before it answers
    rig.gate.release()
    with pytest.raises(ClosedError, match="released"):
        lease.views  # noqa: B018
    # It says what it was.
    assert len(lease) == lease.ready() == lease.wait() == ready
    assert lease.sources == seen(store, ["ram"] * ready)
    assert lease.miss is Miss.TOO_SLOW
    stats_add_up(store, 4)
    assert used(store.stats().misses) == {"too_slow": 4 - ready}


@NEAR
def test_a_lost_lease_gives_its_pins_back(store: Store, rig: Rig) -> None:
    put_behind(rig, chain(4))
    lease = store.acquire(chain(4))
    assert pinned(rig) == 4
    del lease
    gc.collect()
    with store.acquire(chain(1, seed=9)):
        pass
    stats_add_up(store, 5)
    assert pinned(rig) == 0


@NEAR
def test_what_is_late_is_cut_off_at_the_deadline(store: Store, rig: Rig) -> None:
    blocks = chain(6)
    rig.store_below(blocks)
    put(rig.store, blocks.slice(0, 2))
    rig.gate.hold("read")
    with store.acquire(blocks, deadline_s=0.05) as lease:
        rig.gate.arrived("read")
        assert lease.wait() == len(lease) == 2
        assert lease.miss is Miss.DEADLINE
        rig.gate.release()
        assert lease.wait() == len(lease) == check_bytes(lease, blocks) == 2
        assert lease.sources == seen(store, ["ram"] * 2)
    stats_add_up(store, 6)
    assert used(store.stats().misses) == {"deadline": 4}


@pytest.mark.parametrize("deadline_s", [-1.0, 0.0, 1e300, float("inf")])
def test_any_deadline(store: Store, rig: Rig, deadline_s: float) -> None:
    put(rig.store, chain(2))
    if deadline_s > 0 or is_near(store):
        assert get(store, chain(2), deadline_s=deadline_s) == 2
    rig.store_below(chain(2, seed=1))
    with store.acquire(chain(2, seed=1), deadline_s=deadline_s) as lease:
        assert lease.wait() == (2 if deadline_s > 0 else 0)


def test_a_block_that_is_damaged_below_ends_the_lease(store: Store, rig: Rig) -> None:
    blocks = chain(4)
    rig.store_below(blocks)
    damage(rig, blocks.keys[2])
    with store.acquire(blocks) as lease:
        assert lease.wait() == len(lease) == check_bytes(lease, blocks) == 2
        assert lease.miss is Miss.CHECKSUM
        assert lease.sources == seen(store, ["nvme"] * 2)
    assert store.explain(blocks).reason == "checksum"


def test_a_tier_that_fails_is_a_miss(store: Store, rig: Rig) -> None:
    blocks = chain(4)
    rig.store_below(blocks)
    rig.gate.break_("read")
    with store.acquire(blocks) as lease:
        assert lease.wait() == len(lease) == 0
        assert lease.miss is Miss.BREAKER


# ---- waiting


def test_awaiting_leases(store: Store, rig: Rig) -> None:
    rig.store_below(chain(4))
    rig.store_below(chain(4, seed=1))
    put(rig.store, chain(1, seed=2))
    rig.gate.hold("read")

    async def all_of_them() -> list[int]:
        leases = [store.acquire(chain(4, seed=seed)) for seed in (0, 1, 2, 3)]
        rig.gate.arrived("read")
        tasks = [asyncio.ensure_future(_awaited(lease)) for lease in leases]
        await asyncio.sleep(0)
        rig.gate.release()
        counts = await asyncio.gather(*tasks)
        for lease in leases:
            lease.release()
        return counts

    assert asyncio.run(all_of_them()) == [4, 4, 1, 0]


def test_an_awaiting_task_can_be_cancelled(store: Store, rig: Rig) -> None:
    rig.store_below(chain(2))
    rig.gate.hold("read")

    async def give_up() -> None:
        with store.acquire(chain(2), deadline_s=1e6) as lease:
            task = asyncio.ensure_future(_awaited(lease))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(give_up())


async def _awaited(lease: Lease) -> int:
    return await lease


def test_a_release_wakes_who_waits(store: Store, rig: Rig) -> None:
    rig.store_below(chain(2))
    rig.gate.hold("read")
    lease = store.acquire(chain(2), deadline_s=1e6)
    served: list[int] = []
    waiting = [threading.Thread(target=lambda: served.append(lease.wait())) for _ in range(3)]
    for thread in waiting:
        thread.start()
    lease.release()
    for thread in waiting:
        thread.join(PATIENCE_S)
    assert served == [0, 0, 0]


def test_many_threads(store: Store, rig: Rig) -> None:
    """Each its own prompts and a common one, more than RAM holds; every byte is compared."""
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(12):
                for blocks in (chain(8, seed=number * 100 + turn % 3), chain(5, seed=7)):
                    put(store, blocks)
                    get(store, blocks)
                    store.prefetch(blocks)
                    store.probe(blocks)
                if turn % 5 == 4:
                    store.evict(chain(8, seed=number * 100))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    stats_add_up(store, 8 * 12 * 13)
    rig.store.check_invariants()

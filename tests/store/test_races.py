"""Who wins when two do the same at once. Each order of events is brought about, not hoped for."""

from __future__ import annotations

import threading

import pytest

from kvstore.errors import ClosedError
from kvstore.retention import Retention
from kvstore.tier import Miss
from tests.store.conftest import MakeRig
from tests.store.rig import (
    BLOCK,
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

# ---- two writers


def test_the_first_commit_wins(rig: Rig) -> None:
    blocks = chain(4)
    first, second = rig.store.reserve(blocks), rig.store.reserve(blocks)
    assert first.indices == second.indices == [0, 1, 2, 3]
    fill(first.views, blocks.keys)
    for view in second.views:
        view[:] = b"\xff" * BLOCK
    assert first.commit() == 4
    with rig.store.acquire(blocks) as lease:
        assert second.commit() == 0
        assert check_bytes(lease, blocks) == 4
    assert get(rig.store, blocks) == 4
    assert rig.counter("duplicate_blocks") == 4
    assert rig.ram.slots.space.used_bytes == 4 * BLOCK


def test_writers_of_overlapping_chains_share(rig: Rig) -> None:
    blocks = chain(6)
    long = rig.store.reserve(blocks)
    put(rig.store, blocks.slice(0, 3))
    fill(long.views, blocks.keys)
    assert long.commit() == 3
    assert get(rig.store, blocks) == 6


def test_a_block_committed_with_a_retention_keeps_that_of_the_first(ram_rig: Rig) -> None:
    blocks = chain(2)
    first = ram_rig.store.reserve(blocks, retention=Retention(80))
    second = ram_rig.store.reserve(blocks)
    for reservation in (first, second):
        fill(reservation.views, blocks.keys)
        reservation.commit()
    assert ram_rig.column("priority", blocks) == [80] * 2


# ---- a writer and a promotion


def test_a_writer_that_commits_before_a_promotion_lands_wins(rig: Rig) -> None:
    blocks = chain(3)
    rig.store_below(blocks)
    reservation = rig.store.reserve(blocks)  # before the promotion begins
    rig.gate.hold("read")
    with rig.store.acquire(blocks) as lease:
        rig.gate.arrived("read")
        assert lease.ready() == 0
        fill(reservation.views, blocks.keys)
        assert reservation.commit() == 3
        with rig.store.acquire(blocks) as other:
            assert other.ready() == 3
        rig.gate.release()
        assert lease.wait() == 3
        check_bytes(lease, blocks)
        assert min(rig.column("pins", blocks)) >= 1
    assert rig.ram.slots.space.used_bytes == 3 * BLOCK


def test_a_writer_that_commits_after_a_promotion_landed_loses(rig: Rig) -> None:
    blocks = chain(3)
    rig.store_below(blocks)
    reservation = rig.store.reserve(blocks)
    assert get(rig.store, blocks) == 3
    for view in reservation.views:
        view[:] = bytes(BLOCK)
    assert reservation.commit() == 0
    assert get(rig.store, blocks) == 3


def test_what_is_on_its_way_is_not_reserved(rig: Rig) -> None:
    blocks = chain(4)
    rig.store_below(blocks.slice(0, 2))
    rig.gate.hold("read")
    with rig.store.acquire(blocks), rig.store.reserve(blocks) as reservation:
        assert reservation.indices == [2, 3]


# ---- two readers


def test_promotions_of_one_block_are_made_once(rig: Rig) -> None:
    blocks = chain(4)
    rig.store_below(blocks)
    rig.gate.hold("read")
    with rig.store.acquire(blocks) as one, rig.store.acquire(blocks.slice(0, 3)) as two:
        assert rig.store.prefetch(blocks) == 0
        rig.gate.release()
        assert (one.wait(), two.wait()) == (4, 3)
        check_bytes(one, blocks)
        check_bytes(two, blocks)
        assert rig.column("pins", blocks) == [2, 2, 2, 1]
    assert set(rig.gate.read_keys.values()) == {1}
    assert rig.counter("coalesced_blocks") == 3
    assert rig.counter("promoted_blocks") == 4


def test_a_prefetch_and_an_acquire_are_one_read(rig: Rig) -> None:
    blocks = chain(4)
    rig.store_below(blocks)
    rig.gate.hold("read")
    assert rig.store.prefetch(blocks.slice(0, 2)) == 2
    with rig.store.acquire(blocks) as lease:
        rig.gate.release()
        assert lease.wait() == 4
    assert set(rig.gate.read_keys.values()) == {1}


def test_looking_at_a_lease_again_does_not_pin_again(rig: Rig) -> None:
    blocks = chain(4)
    rig.store_below(blocks)
    with rig.store.acquire(blocks) as lease:
        lease.wait()
        for _ in range(3):
            lease.ready()
            lease.views  # noqa: B018
            lease.wait(2)
        assert rig.column("pins", blocks) == [1] * 4
    assert rig.column("pins", blocks) == [0] * 4


def test_one_reader_gives_up_and_the_other_is_served(rig: Rig) -> None:
    blocks = chain(4)
    rig.store_below(blocks)
    rig.gate.hold("read")
    hasty, patient = rig.store.acquire(blocks), rig.store.acquire(blocks)
    hasty.release()
    rig.gate.release()
    assert patient.wait() == 4
    check_bytes(patient, blocks)
    patient.release()
    stats_add_up(rig.store, 8)
    assert rig.store.stats().misses == {"too_slow": 4}


def test_releasing_wakes_whoever_waits_in_another_thread(rig: Rig) -> None:
    rig.store_below(chain(2))
    rig.gate.hold("read")
    lease = rig.store.acquire(chain(2), deadline_s=10_000)
    served: list[int] = []
    waiter = threading.Thread(target=lambda: served.append(lease.wait()))
    waiter.start()
    lease.release()
    waiter.join(PATIENCE_S)
    assert served == [0]


def test_views_asked_for_by_many_threads_are_the_right_ones(rig: Rig) -> None:
    blocks = chain(24)
    rig.store_below(blocks)
    wrong: list[int] = []
    with rig.store.acquire(blocks) as lease:

        def look() -> None:
            seen = 0
            while seen < 24:
                lease.wait(seen + 1)
                views = lease.views
                seen = len(views)
                pairs = enumerate(zip(views, blocks.keys, strict=False))
                wrong.extend(i for i, (v, k) in pairs if bytes(v) != content(k))

        readers = [threading.Thread(target=look) for _ in range(4)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(PATIENCE_S)
    assert wrong == []


def test_whoever_looks_while_a_lease_is_cut_sees_no_more_than_is_ready(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is asked for in the midst of the cut; another thread might look just then."""
    blocks = chain(4)
    rig.store_below(blocks)
    rig.gate.hold("read")
    lease = rig.store.acquire(blocks, deadline_s=1.0)
    seen: list[int] = []

    def look() -> float:
        if not lease._pending:  # or it waits for the lock, which is held
            seen.append(len(lease.views))
        return rig.clock.now_s

    rig.clock.now_s += 2.0
    with monkeypatch.context() as patch:
        patch.setattr(rig.clock, "wall_s", look)
        assert lease.ready() == 0
    assert seen == [0]
    lease.release()


# ---- evicting what is moving


def test_evicting_a_block_that_is_queued_for_nvme(rig: Rig) -> None:
    blocks, first = chain(4), chain(1, seed=1)
    rig.gate.hold("write")
    put(rig.store, first)
    rig.gate.arrived("write")
    put(rig.store, chain(1, seed=2))
    rig.gate.arrived("write")  # both writers are busy: what comes now is queued
    put(rig.store, blocks)
    assert rig.store.evict(blocks) == 4
    rig.gate.release()
    assert rig.store.flush(PATIENCE_S)
    assert rig.nvme.peek(blocks.keys) == [False] * 4
    assert rig.nvme.peek(first.keys) == [True]


def test_evicting_a_block_that_is_being_written(rig: Rig) -> None:
    """Gone at once, though the tier still reads its slot; and gone below once it is written."""
    blocks = chain(4)
    rig.gate.hold("write")
    put(rig.store, blocks)
    rig.gate.arrived("write")
    assert rig.store.evict(blocks) == 4
    assert rig.store.probe(blocks).tiers == [None] * 4
    assert rig.store.explain(blocks).reason == "evicted"
    assert rig.ram.slots.space.used_bytes == 4 * BLOCK  # nobody else may have them yet
    rig.store.check_invariants()
    rig.gate.release()
    rig.until(rig.is_quiet)
    assert rig.ram.slots.space.used_bytes == 0
    assert rig.nvme.peek(blocks.keys) == [False] * 4
    assert rig.store.probe(blocks).tiers == [None] * 4


def test_evicting_what_one_of_two_writers_has_spares_the_other(rig: Rig) -> None:
    """The writer that lands first must not take the other's evictions for done."""
    one, two = chain(2, seed=1), chain(2, seed=2)
    rig.gate.hold("write")
    put(rig.store, one)
    rig.gate.arrived("write")
    put(rig.store, two)
    rig.gate.arrived("write")
    rig.store.evict(one)
    rig.store.evict(two.slice(1))
    rig.gate.release()
    rig.until(rig.is_quiet)
    assert rig.nvme.peek(one.keys) == [False] * 2
    assert rig.nvme.peek(two.keys) == [True, False]
    assert get(rig.store, two) == 1


def test_evicting_a_leased_block_that_is_being_written(rig: Rig) -> None:
    """The reader keeps it; NVMe does not; and its slot stays until both are done."""
    blocks = chain(2)
    rig.gate.hold("write")
    put(rig.store, blocks)
    rig.gate.arrived("write")
    with rig.store.acquire(blocks) as lease:
        assert rig.store.evict(blocks) == 0
        assert check_bytes(lease, blocks) == 2
    rig.store.check_invariants()
    assert rig.column("pins", blocks) == [1, 1]  # by the writer
    rig.gate.release()
    rig.until(rig.is_quiet)
    assert rig.nvme.peek(blocks.keys) == [False] * 2
    assert rig.store.probe(blocks).tiers == ["ram"] * 2


def test_a_block_that_is_evicted_and_put_again_survives_a_restart(make_rig: MakeRig) -> None:
    """The delete of the old one must not take the new one with it."""
    rig = make_rig()
    blocks = chain(3)
    put(rig.store, blocks)
    assert rig.store.flush(PATIENCE_S)
    rig.gate.hold("delete")
    assert rig.store.evict(blocks) == 3
    rig.gate.arrived("delete")
    assert put(rig.store, blocks) == 3
    assert rig.store.probe(blocks).tiers == ["ram"] * 3
    assert not rig.store.flush(0)
    rig.gate.release()
    rig.store.close()
    again = make_rig()
    assert get(again.store, blocks) == 3


def test_a_block_being_written_that_is_evicted_and_put_again(make_rig: MakeRig) -> None:
    rig = make_rig()
    blocks = chain(3)
    rig.gate.hold("write")
    put(rig.store, blocks)
    rig.gate.arrived("write")
    assert rig.store.evict(blocks) == 3
    assert put(rig.store, blocks) == 3
    assert rig.store.evict(blocks) == 3
    assert put(rig.store, blocks) == 3
    rig.store.check_invariants()
    rig.gate.release()
    rig.store.close()
    again = make_rig()
    assert get(again.store, blocks) == 3


def test_evicting_a_block_that_is_being_promoted(rig: Rig) -> None:
    blocks = chain(3)
    rig.store_below(blocks)
    rig.gate.hold("read")
    with rig.store.acquire(blocks) as lease:
        rig.gate.arrived("read")
        assert rig.store.evict(blocks.slice(1)) == 2
        assert rig.store.probe(blocks).tiers == ["nvme", None, None]
        with rig.store.acquire(blocks.slice(1)) as late:
            assert len(late) == 0
        rig.gate.release()
        assert lease.wait() == 1
        assert lease.miss is Miss.EVICTED
        check_bytes(lease, blocks)
    rig.until(rig.is_quiet)
    assert rig.store.probe(blocks).tiers == ["ram", None, None]
    assert rig.nvme.peek(blocks.keys) == [True, False, False]
    assert rig.ram.slots.space.used_bytes == BLOCK
    stats_add_up(rig.store, 5)


def test_a_delete_that_fails_is_counted(rig: Rig) -> None:
    blocks = chain(2)
    rig.store_below(blocks)
    rig.gate.break_("delete")
    assert rig.store.evict(blocks) == 2
    rig.until(rig.is_quiet)
    assert rig.counter("evictions_failed_blocks") == 2
    # It is a cache: what could not be deleted is what it was.
    assert get(rig.store, blocks) == 2


# ---- closing


def test_a_reservation_outlives_its_store(rig: Rig) -> None:
    reservation = rig.store.reserve(chain(2))
    views = reservation.views
    rig.store.close()
    views[0][:4] = b"late"
    with pytest.raises(ClosedError):
        reservation.commit()
    with pytest.raises(ClosedError):
        reservation.views  # noqa: B018
    reservation.abort()


def test_a_lease_outlives_its_store(rig: Rig) -> None:
    put(rig.store, chain(2))
    lease = rig.store.acquire(chain(2))
    views = lease.views
    rig.store.close()
    assert bytes(views[0]) == content(chain(2).keys[0])
    with pytest.raises(ClosedError):
        lease.views  # noqa: B018
    lease.release()
    assert used(rig.hub.hits) == {}

"""What happens at each bound, and that life goes on after it."""

from __future__ import annotations

import dataclasses

import pytest

from kvstore import hub
from kvstore.retention import Retention
from kvstore.tier import Miss
from tests.store.conftest import MakeRig
from tests.store.rig import (
    BLOCK,
    NAMESPACE,
    PATIENCE_S,
    Rig,
    chain,
    check_bytes,
    fill,
    get,
    put,
    stats_add_up,
)


def test_a_full_demotion_queue_keeps_blocks_in_ram_until_close(make_rig: MakeRig) -> None:
    rig = make_rig(demotion_queue_blocks=3, transfers_in_flight=1, transfer_bytes=BLOCK)
    rig.gate.hold("write")
    put(rig.store, chain(1, seed=1))
    rig.gate.arrived("write")  # in flight, so no longer in the queue
    blocks = chain(8)
    assert put(rig.store, blocks) == 8
    assert rig.counter("demotions_dropped_blocks") == 5
    assert sum(rig.column("pins", blocks)) == 3
    rig.gate.release()
    rig.store.close()
    again = make_rig()
    assert get(again.store, blocks) == 8


def test_flush_goes_through_a_queue_that_is_too_short(make_rig: MakeRig) -> None:
    rig = make_rig(demotion_queue_blocks=2, transfer_bytes=BLOCK)
    put(rig.store, chain(30))
    assert rig.store.flush(PATIENCE_S)
    assert rig.nvme.peek(chain(30).keys) == [True] * 30


def test_ram_full_of_pinned_blocks_refuses_and_recovers(make_rig: MakeRig) -> None:
    rig = make_rig(ram_blocks=16)
    rig.gate.hold("write")
    assert put(rig.store, chain(16)) == 16
    with rig.store.reserve(chain(5, seed=1)) as reservation:
        assert len(reservation) == 0
        assert reservation.commit() == 0
    assert rig.counter("reserve_refused_blocks") == 5
    rig.gate.release()
    assert rig.store.flush(PATIENCE_S)
    assert put(rig.store, chain(5, seed=1)) == 5
    assert rig.store.flush(PATIENCE_S)
    assert get(rig.store, chain(16)) == 16


def test_a_reservation_takes_what_room_there_is(make_rig: MakeRig) -> None:
    rig = make_rig(nvme=False, ram_blocks=16)
    put(rig.store, chain(12))
    with rig.store.acquire(chain(12)), rig.store.reserve(chain(10, seed=1)) as reservation:
        assert reservation.indices == [0, 1, 2, 3]
        fill(reservation.views, chain(10, seed=1).keys[:4])
        assert reservation.commit() == 4
    assert get(rig.store, chain(10, seed=1)) == 4


def test_a_block_larger_than_ram_evicts_nothing(make_rig: MakeRig) -> None:
    rig = make_rig(nvme=False, ram_blocks=8)
    put(rig.store, chain(8))
    huge = dataclasses.replace(NAMESPACE, layers=9)
    assert put(rig.store, chain(1, namespace=huge)) == 0
    assert get(rig.store, chain(8)) == 8


def test_storing_the_end_of_a_chain_does_not_cost_its_beginning(make_rig: MakeRig) -> None:
    """The ancestors are the oldest blocks in RAM; without them the new ones are of no use."""
    rig = make_rig(nvme=False, ram_blocks=16)
    blocks = chain(16)
    put(rig.store, blocks.slice(0, 8))
    put(rig.store, chain(8, seed=1))
    assert put(rig.store, blocks) == 8
    assert get(rig.store, blocks) == 16


def test_prefetching_the_end_of_a_chain_does_not_cost_its_beginning(make_rig: MakeRig) -> None:
    rig = make_rig(ram_blocks=16)
    blocks = chain(16)
    rig.store_below(blocks)
    put(rig.store, blocks.slice(0, 8))
    put(rig.store, chain(8, seed=1))
    assert rig.store.flush(PATIENCE_S)
    assert rig.store.prefetch(blocks) == 8
    rig.until(rig.is_quiet)
    assert rig.store.probe(blocks).tiers == ["ram"] * 16


def test_a_prefetch_does_not_evict_what_has_a_better_claim(make_rig: MakeRig) -> None:
    rig = make_rig(ram_blocks=16)
    rig.store_below(chain(8))
    kept = chain(12, seed=1)
    put(rig.store, kept, Retention(60))
    assert rig.store.flush(PATIENCE_S)
    assert rig.store.prefetch(chain(8)) == 4
    rig.until(rig.is_quiet)
    assert rig.store.probe(kept).tiers == ["ram"] * 12
    assert rig.counter("prefetch_refused_blocks") == 4


def test_a_prefetch_stops_where_the_chain_breaks(rig: Rig) -> None:
    blocks = chain(6)
    rig.store_below(blocks)
    rig.store.evict(blocks.slice(2, 3))
    assert rig.store.prefetch(blocks) == 2
    rig.until(rig.is_quiet)
    assert rig.store.probe(blocks).tiers == ["ram", "ram", None, "nvme", "nvme", "nvme"]


def test_a_full_promotion_queue_shortens_an_acquire(make_rig: MakeRig) -> None:
    rig = make_rig(promotion_queue_bytes=3 * BLOCK)
    blocks = chain(6)
    rig.store_below(blocks)
    put(rig.store, blocks.slice(5))
    rig.gate.hold("read")
    with rig.store.acquire(blocks) as lease:
        assert len(lease) == 3
        assert lease.miss is Miss.TOO_SLOW
        with rig.store.acquire(blocks) as other:  # coalesced: needs no room
            assert len(other) == 3
        assert rig.store.prefetch(blocks) == 0
        assert rig.counter("prefetch_refused_blocks") == 2
        assert rig.store.queued_bytes() == {"nvme": 3 * BLOCK}
        rig.gate.release()
        assert lease.wait() == 3
    assert rig.counter("acquires_shortened") == 2
    assert rig.store.queued_bytes() == {"nvme": 0}
    assert get(rig.store, blocks) == 6
    stats_add_up(rig.store, 18)


def test_an_acquire_is_shortened_where_ram_has_no_room(make_rig: MakeRig) -> None:
    rig = make_rig(ram_blocks=16)
    blocks = chain(12)
    rig.store_below(blocks)
    pinned = chain(10, seed=1)
    put(rig.store, pinned)
    assert rig.store.flush(PATIENCE_S)
    with rig.store.acquire(pinned), rig.store.acquire(blocks) as lease:
        assert lease.wait() == 6
        assert lease.miss is Miss.TOO_SLOW
        check_bytes(lease, blocks)
    assert get(rig.store, blocks) == 12


def test_transfers_are_cut_up_and_take_turns(make_rig: MakeRig) -> None:
    rig = make_rig(transfer_bytes=2 * BLOCK, transfers_in_flight=2)
    blocks = chain(12)
    rig.store_below(blocks)
    assert rig.gate.calls["write"] >= 6
    rig.gate.hold("read")
    with rig.store.acquire(blocks) as lease:
        rig.gate.arrived("read")
        rig.gate.arrived("read")
        assert rig.gate.calls["read"] == 2
        rig.gate.release()
        assert lease.wait() == 12
    assert rig.gate.calls["read"] == 6


def test_leases_do_not_pile_up_word_for_a_tier_that_is_not_there(ram_rig: Rig) -> None:
    put(ram_rig.store, chain(4))
    for _ in range(10):
        get(ram_rig.store, chain(4))
    assert len(ram_rig.hub.used) == 0


def test_asking_for_strangers_is_not_remembered(ram_rig: Rig) -> None:
    put(ram_rig.store, chain(1))
    for i in range(20):
        stranger = dataclasses.replace(NAMESPACE, salt=str(i))
        get(ram_rig.store, chain(1, namespace=stranger))
        ram_rig.store.retain(chain(1, namespace=stranger), Retention(50))
        ram_rig.store.explain(chain(1, namespace=stranger))
    assert len(ram_rig.ram.slots._namespaces) == 1
    assert len(ram_rig.hub.namespaces) == 1


def test_too_many_namespaces_stay_in_ram_and_nvme_serves_the_others(make_rig: MakeRig) -> None:
    rig = make_rig()
    rig.store_below(chain(4))
    many = [dataclasses.replace(NAMESPACE, salt="s" * 4000 + str(number)) for number in range(30)]
    for each in many:
        put(rig.store, chain(1, namespace=each))
        assert rig.store.flush(PATIENCE_S)
    below = [rig.store.probe(chain(1, namespace=each)).tiers for each in many]
    assert rig.store.stats().nvme["breaker_open"] is False
    assert rig.counter("demotions_refused_full_blocks") > 0
    assert below == [["ram"]] * len(many)
    rig.drop_from_ram(chain(1, namespace=many[0]))
    assert get(rig.store, chain(1, namespace=many[0])) == 1
    assert get(rig.store, chain(4)) == 4
    rig.store_below(chain(4, seed=1))


def test_namespaces_without_blocks_are_forgotten(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "NAMESPACES_REMEMBERED", 4)
    rig = make_rig(ram_blocks=8)
    many = [dataclasses.replace(NAMESPACE, salt=str(number)) for number in range(100)]
    for each in many:
        put(rig.store, chain(1, namespace=each))
        assert rig.store.flush(PATIENCE_S)
    assert len(rig.hub.namespaces) <= 2 * 8
    assert [get(rig.store, chain(1, namespace=each)) for each in many] == [1] * 100

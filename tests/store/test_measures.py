"""What the store says of itself, against what was done to it."""

from __future__ import annotations

import dataclasses

import pytest

from kvstore.errors import ClosedError
from kvstore.histogram import Distribution
from tests.store.conftest import MakeRig
from tests.store.rig import BLOCK, NAMESPACE, PATIENCE_S, Rig, chain, get, put

HOUR_S, DAY_S = 3_600.0, 86_400.0
OTHER = dataclasses.replace(NAMESPACE, model="other", layers=2)  # of blocks twice as large


def within(read: Distribution, low_s: float, high_s: float) -> int:
    """How many values lie between two of the bounds."""
    counts = zip((*read.bounds, float("inf")), read.counts, strict=True)
    return sum(count for bound, count in counts if low_s < bound <= high_s)


@pytest.mark.parametrize("used_again", [False, True])
def test_the_age_of_what_makes_room_in_ram(ram_rig: Rig, used_again: bool) -> None:
    """It begins with the last use, be that the writing."""
    put(ram_rig.store, chain(40))
    ram_rig.clock.now_s += 2 * DAY_S
    if used_again:
        assert get(ram_rig.store, chain(40)) == 40
    ram_rig.clock.now_s += 2 * HOUR_S
    put(ram_rig.store, chain(64, seed=1))
    read = ram_rig.store.distributions()["ram_eviction_age_s"]
    assert read.observed == ram_rig.store.stats().ram["evicted_blocks"] == 40
    age_s = 2 * HOUR_S + (0 if used_again else 2 * DAY_S)
    assert read.total == 40 * age_s
    bounds = (HOUR_S, 4 * HOUR_S) if used_again else (DAY_S, 3 * DAY_S)
    assert within(read, *bounds) == 40


def test_the_age_of_what_makes_room_on_nvme(make_rig: MakeRig) -> None:
    rig = make_rig(nvme_bytes=2 << 20)
    room = rig.store.stats().nvme["capacity_bytes"] // BLOCK
    for seed in range(room // 10):
        rig.store_below(chain(10, seed=seed))
    rig.clock.now_s += 2 * HOUR_S
    assert get(rig.store, chain(10)) == 10  # which are young now
    assert get(rig.store, chain(0, seed=77)) == 0  # and the drive knows of it
    for seed in range(100, 104):
        rig.store_below(chain(10, seed=seed))
    read = rig.store.distributions()["nvme_eviction_age_s"]
    assert read.observed == rig.store.stats().nvme["evicted_blocks"] > 20
    assert within(read, HOUR_S, 4 * HOUR_S) == read.observed
    assert read.total == read.observed * 2 * HOUR_S


def test_what_is_dropped_on_request_has_not_made_room(rig: Rig) -> None:
    """Neither in RAM nor on NVMe, so that counters and ages speak of the same blocks."""
    rig.store_below(chain(5))
    put(rig.store, chain(5))
    assert rig.store.evict(chain(5)) == 5
    assert rig.store.flush(30)
    stats = rig.store.stats()
    assert (stats.ram["blocks"], stats.nvme["blocks"]) == (0, 0)
    assert stats.ram["evicted_blocks"] == stats.nvme.get("evicted_blocks", 0) == 0


def test_how_long_blocks_took(rig: Rig) -> None:
    rig.gate.hold("write", "read")
    put(rig.store, chain(5))
    rig.gate.arrived("write")
    rig.clock.now_s += 4.0
    rig.gate.release("write")
    assert rig.store.flush(PATIENCE_S)
    demoted = rig.store.distributions()["demotion_s"]
    assert within(demoted, 2.5, 5.0) == demoted.observed == 5
    assert demoted.total == 20.0

    rig.drop_from_ram(chain(5))
    with rig.store.acquire(chain(5), deadline_s=60.0) as lease:
        rig.gate.arrived("read")
        rig.clock.now_s += 0.3
        rig.gate.release()
        assert lease.wait() == 5
    promoted = rig.store.distributions()["promotion_s"]
    assert within(promoted, 0.25, 0.5) == promoted.observed == 5


def test_what_never_arrived_took_no_time(rig: Rig) -> None:
    rig.gate.break_("write")
    put(rig.store, chain(5))
    rig.store.flush(PATIENCE_S)
    assert rig.store.distributions()["demotion_s"].observed == 0
    rig.gate.mend()


def test_bytes_that_moved(rig: Rig) -> None:
    rig.store_below(chain(5))
    rig.store_below(chain(3, namespace=OTHER))
    assert get(rig.store, chain(5)) == 5
    assert get(rig.store, chain(3, namespace=OTHER)) == 3
    assert get(rig.store, chain(2)) == 2
    counters = rig.store.stats().counters
    assert counters["committed_bytes"] == counters["demoted_bytes"] == (5 + 2 * 3) * BLOCK
    assert counters["promoted_bytes"] == (5 + 2 * 3) * BLOCK
    assert counters["served_bytes"] == (5 + 2 * 3 + 2) * BLOCK


def test_bytes_that_two_wrote_count_once(ram_rig: Rig) -> None:
    with ram_rig.store.reserve(chain(3)) as one, ram_rig.store.reserve(chain(3)) as other:
        assert (one.commit(), other.commit()) == (3, 0)
    assert ram_rig.store.stats().counters["committed_bytes"] == 3 * BLOCK


def test_who_holds_what(rig: Rig) -> None:
    put(rig.store, chain(4))
    put(rig.store, chain(3, namespace=OTHER))
    assert rig.store.flush(PATIENCE_S)
    rig.drop_from_ram(chain(4))
    put(rig.store, chain(1))
    held = {usage.namespace: usage for usage in rig.store.usage()}
    assert held[NAMESPACE].blocks == {"ram": 1, "nvme": 4}
    assert held[NAMESPACE].nbytes == {"ram": BLOCK, "nvme": 4 * BLOCK}
    assert held[OTHER].blocks == {"ram": 3, "nvme": 3}
    assert held[OTHER].nbytes == {"ram": 6 * BLOCK, "nvme": 6 * BLOCK}
    rig.store.evict(chain(3, namespace=OTHER))
    rig.until(rig.is_quiet)
    held = {usage.namespace: usage for usage in rig.store.usage()}
    assert held[OTHER].blocks == held[OTHER].nbytes == {}


def test_who_holds_what_after_a_restart(make_rig: MakeRig) -> None:
    first = make_rig()
    put(first.store, chain(4))
    put(first.store, chain(3, namespace=OTHER))
    first.store.close()
    held = {usage.namespace: usage for usage in make_rig().store.usage()}
    assert held[NAMESPACE].nbytes == {"nvme": 4 * BLOCK}
    assert held[OTHER].nbytes == {"nvme": 6 * BLOCK}


def test_many_namespaces(ram_rig: Rig) -> None:
    for number in range(40):
        put(ram_rig.store, chain(1, namespace=dataclasses.replace(NAMESPACE, weights=str(number))))
    assert [usage.blocks for usage in ram_rig.store.usage()] == [{"ram": 1}] * 40


def test_a_closed_store_says_nothing(ram_rig: Rig) -> None:
    ram_rig.store.close()
    for ask in (ram_rig.store.stats, ram_rig.store.distributions, ram_rig.store.usage):
        with pytest.raises(ClosedError):
            ask()

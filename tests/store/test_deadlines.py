"""Deadlines: what is late is a counted miss, and never waited for."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest

from kvstore.tier import Miss
from tests.store.conftest import MakeRig
from tests.store.rig import BLOCK, Rig, chain, check_bytes, get, put, stats_add_up, used


def test_what_has_not_come_by_the_deadline_is_cut_off(rig: Rig) -> None:
    blocks = chain(4)
    rig.store_below(blocks)
    rig.gate.hold("read")
    with rig.store.acquire(blocks, deadline_s=2.0) as lease:
        assert (len(lease), lease.ready(), lease.miss) == (4, 0, None)
        rig.clock.now_s += 1.9
        assert len(lease) == 4
        assert lease.ready() == 0
        assert len(lease) == 4
        rig.clock.now_s += 0.2
        assert lease.wait() == 0
        assert (len(lease), lease.miss) == (0, Miss.DEADLINE)
    assert used(rig.store.stats().misses) == {"deadline": 4}
    rig.gate.release()
    rig.until(rig.is_quiet)
    # What came too late is in RAM for the next one.
    assert rig.store.probe(blocks).tiers == ["ram"] * 4
    assert get(rig.store, blocks) == 4
    stats_add_up(rig.store, 8)


def test_what_came_in_time_is_kept(make_rig: MakeRig) -> None:
    rig = make_rig(transfer_bytes=BLOCK, transfers_in_flight=1)
    blocks = chain(5)
    rig.store_below(blocks)
    rig.gate.hold("read")
    with rig.store.acquire(blocks, deadline_s=2.0) as lease:
        rig.gate.arrived("read")
        rig.gate.release()
        assert lease.wait(2) >= 2
        rig.gate.hold("read")
        rig.clock.now_s += 3
        served = lease.wait()
        assert 2 <= served <= 5
        assert len(lease) == served
        assert check_bytes(lease, blocks) == served
    rig.gate.release()
    stats_add_up(rig.store, 5)


def test_the_default_deadline_is_that_of_the_bounds(make_rig: MakeRig) -> None:
    rig = make_rig(deadline_s=7.0)
    rig.store_below(chain(2))
    rig.gate.hold("read")
    with rig.store.acquire(chain(2)) as lease:
        rig.clock.now_s += 6.9
        assert lease.ready() == 0
        assert lease.miss is None
        rig.clock.now_s += 0.2
        assert lease.ready() == 0
        assert lease.miss is Miss.DEADLINE


def test_a_timeout_of_wait_is_no_deadline(rig: Rig) -> None:
    rig.store_below(chain(2))
    rig.gate.hold("read")
    with rig.store.acquire(chain(2)) as lease:
        assert lease.wait(timeout_s=0) == 0
        assert (len(lease), lease.miss) == (2, None)
        rig.gate.release()
        assert lease.wait() == 2


def test_a_deadline_may_be_never(rig: Rig) -> None:
    rig.store_below(chain(2))
    rig.gate.hold("read")
    with rig.store.acquire(chain(2), deadline_s=math.inf) as lease:
        waiter = threading.Timer(0.0, rig.gate.release)
        waiter.start()
        assert lease.wait(timeout_s=1e300) == 2
        waiter.join()
    rig.gate.hold("write")
    put(rig.store, chain(2, 1))
    waiter = threading.Timer(0.0, rig.gate.release)
    waiter.start()
    assert rig.store.flush(math.inf)
    waiter.join()


def test_waiting_for_a_part(make_rig: MakeRig) -> None:
    rig = make_rig(transfer_bytes=BLOCK, transfers_in_flight=1)
    blocks = chain(4)
    rig.store_below(blocks.slice(1))
    with rig.store.reserve(blocks.slice(0, 1)) as reservation:
        reservation.views[0][:] = b"\x07" * BLOCK
        reservation.commit()
    rig.gate.hold("read")
    with rig.store.acquire(blocks) as lease:
        assert lease.wait(1) == 1
        assert lease.wait(0) == 1
        rig.gate.release()
        assert lease.wait(100) == 4
        assert lease.sources == ["ram", "nvme", "nvme", "nvme"]


def test_a_lease_released_before_it_is_ready_counts_as_too_slow(rig: Rig) -> None:
    blocks = chain(3)
    rig.store_below(blocks)
    rig.gate.hold("read")
    rig.store.acquire(blocks).release()
    assert used(rig.store.stats().misses) == {"too_slow": 3}
    assert used(rig.store.stats().hits) == {}


@pytest.mark.parametrize("deadline_s", [0.0, -1.0])
def test_a_deadline_of_nothing_serves_what_is_there(rig: Rig, deadline_s: float) -> None:
    blocks = chain(4)
    rig.store_below(blocks)
    with rig.store.reserve(blocks.slice(0, 2)) as reservation:
        for view in reservation.views:
            view[:] = bytes(BLOCK)
        reservation.commit()
    with rig.store.acquire(blocks, deadline_s=deadline_s) as lease:
        # The read may have been quicker than we were, but then it is whole.
        assert lease.wait() in (2, 4)


def test_loads_are_measured_for_the_planner(rig: Rig) -> None:
    rig.store_below(chain(4))
    assert rig.store.load_costs["nvme"].observations == 0
    rig.gate.hold("read")
    with rig.store.acquire(chain(4)) as lease:
        rig.gate.arrived("read")
        rig.clock.now_s += 2.0
        rig.gate.release()
        lease.wait()
    rig.store._loop.spawn(asyncio.sleep(0)).result()  # what was measured is written down by then
    seconds = rig.store.load_costs["nvme"].seconds(1, 4 * BLOCK)
    assert seconds == pytest.approx(2.0)

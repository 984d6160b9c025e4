"""A retention holds on every tier, and ends on every tier."""

from __future__ import annotations

from kvstore.retention import DEFAULT_PRIORITY, Retention
from tests.store.conftest import MakeRig
from tests.store.rig import BLOCK, NAMESPACE, Rig, chain, put


def test_retained_while_it_is_leased_and_being_written(rig: Rig) -> None:
    """In RAM the clock waits for the lease; below, where nobody holds the block, it runs."""
    blocks = chain(2)
    rig.gate.hold("write")
    put(rig.store, blocks)
    rig.gate.arrived("write")
    with rig.store.acquire(blocks):
        assert rig.store.retain(blocks, Retention(80, ttl_s=10.0)).accepted == 2
        rig.gate.release()
        assert rig.store.flush(30.0)
        assert rig.column("priority", blocks) == [80, 80]
        assert rig.nvme.protected_bytes(NAMESPACE.fingerprint) == 2 * BLOCK
        rig.clock.now_s += 11.0
        assert rig.nvme.protected_bytes(NAMESPACE.fingerprint) == 0
    rig.clock.now_s += 11.0
    rig.ram.slots.expire(rig.clock.now_s)
    assert rig.column("priority", blocks) == [DEFAULT_PRIORITY] * 2


def test_retained_for_another_time_while_it_is_being_written(rig: Rig) -> None:
    rig.gate.hold("write")
    put(rig.store, chain(2), Retention(80))
    rig.gate.arrived("write")
    assert rig.store.retain(chain(2), Retention(80, ttl_s=10.0)).accepted == 2
    rig.gate.release()
    assert rig.store.flush(30.0)
    assert rig.nvme.protected_bytes(NAMESPACE.fingerprint) == 2 * BLOCK
    assert rig.gate.calls["retain"] == 1
    rig.clock.now_s += 11.0
    assert rig.nvme.protected_bytes(NAMESPACE.fingerprint) == 0


def test_what_nobody_retained_meanwhile_is_written_once(rig: Rig) -> None:
    rig.gate.hold("write")
    put(rig.store, chain(2), Retention(80, ttl_s=10.0))
    put(rig.store, chain(2, 1))
    rig.gate.arrived("write")
    rig.clock.now_s += 5.0
    rig.gate.release()
    assert rig.store.flush(30.0)
    assert rig.gate.calls["retain"] == 0


def test_what_expired_below_is_no_burden_on_the_budget(make_rig: MakeRig) -> None:
    rig = make_rig(protected_bytes=2 * BLOCK)
    rig.store_below(chain(2), Retention(80, ttl_s=10.0))
    assert rig.store.retain(chain(2, 1), Retention(80)).absent == 2
    put(rig.store, chain(2, 1))
    assert rig.store.retain(chain(2, 1), Retention(80)).refused == 2
    rig.clock.now_s += 11.0
    assert rig.store.retain(chain(2, 1), Retention(80)).accepted == 2

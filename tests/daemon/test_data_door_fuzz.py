"""As test_local_door_fuzz, through the data door, and as a tenant with few rights to anything."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore import wire
from kvstore.client.client import StoreClient
from tests.daemon.data_doors import DataDaemon
from tests.daemon.tenants import QUOTA_BLOCKS, THIEF, THIEFS
from tests.daemon.test_local_door_fuzz import KNOWN, REQUESTS
from tests.store.rig import BLOCK, NAMESPACE, PATIENCE_S, Rig, check_bytes, put

HELLO = wire.encode(wire.Hello(wire.VERSION, "fuzz", THIEF))
OPENED = HELLO + wire.encode(wire.OpenNamespace(1, NAMESPACE.to_json()))
# Reservations are numbered from 1; some of these announce what was reserved.
COMMITS = st.builds(
    lambda number, blocks: (
        wire.encode(wire.Commit(9, number, blocks * BLOCK)) + bytes(blocks * BLOCK)
    ),
    st.integers(1, 4),
    st.integers(0, 3),
)

Served = tuple[Rig, DataDaemon, StoreClient]
many = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@pytest.fixture
def served(rig: Rig, tenants_daemon: DataDaemon, victim: StoreClient) -> Iterator[Served]:
    put(victim, KNOWN)
    yield rig, tenants_daemon, victim
    with victim.acquire(KNOWN) as lease:
        assert lease.wait() == len(KNOWN)  # nobody has evicted any


@many
@given(
    st.lists(REQUESTS | COMMITS, max_size=25),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=6)), max_size=2),
    st.integers(1, 300),
)
def test_requests_of_all_kinds(
    served: Served, frames: list[bytes], damages: list[tuple[int, bytes]], step: int
) -> None:
    data = bytearray(OPENED + b"".join(frames))
    for at, inserted in damages:
        data[at : at + len(inserted) // 2] = inserted
    send(served, bytes(data), step)


@many
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes(served: Served, data: bytes, opened: bool) -> None:
    send(served, OPENED * opened + data, 1000)


def send(served: Served, data: bytes, step: int) -> None:
    """In pieces; then leave, and see that nothing has come of it."""
    rig, daemon, victim = served
    with (
        socket.create_connection(daemon.endpoint, PATIENCE_S) as sock,
        contextlib.suppress(ConnectionError),
    ):
        for start in range(0, len(data), step * 20):
            sock.sendall(data[start : start + step * 20])
        with victim.acquire(KNOWN) as lease:
            assert lease.wait() == check_bytes(lease, KNOWN) == len(KNOWN)
    daemon.until(lambda: len(daemon.data_door._connections) == 1)
    assert len(daemon.service.sessions) == 1
    assert not daemon.service._watchers
    rig.until(rig.is_quiet)
    rig.store.check_invariants()
    assert rig.ram.slots.space.used_bytes == len(rig.ram.slots) * BLOCK
    quota = daemon.service.quota_of(THIEFS)
    assert quota is not None
    assert (quota.reserved_bytes, len(quota._reserved)) == (0, 0)
    assert len(rig.ram.slots) <= len(KNOWN) + QUOTA_BLOCKS

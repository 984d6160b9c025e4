"""Whatever a client sends: the daemon lives, serves others the right bytes, and forgets it."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore import wire
from kvstore.client.client import StoreClient
from tests.daemon.doors import Daemon
from tests.daemon.raw_client import HELLO, RawClient
from tests.daemon.subjects import put_behind
from tests.store.rig import BLOCK, NAMESPACE, Rig, chain, check_bytes, put

KNOWN = chain(8)
NUMBERS = st.integers(0, 6) | st.integers(0, 1 << 62)
SECONDS = st.floats(0, 1e9) | st.just(0.0)
TTL = st.none() | st.floats(0, 1e9)
PRIORITY = st.integers(0, 100)
KEYS = st.lists(
    st.sampled_from([*KNOWN.keys, *chain(8, seed=1).keys]) | st.binary(min_size=16, max_size=16),
    max_size=12,
).map(b"".join)
PARENTS = st.sampled_from([NAMESPACE.fingerprint, KNOWN.keys[0], b"p" * 16])
RECORDS = st.sampled_from(
    [NAMESPACE.to_json(), NAMESPACE.to_json().replace("tiny", "other"), "{}", "[" * 99]
) | st.text(max_size=20)
ABOUT_CHAINS = (NUMBERS, NUMBERS, PARENTS, KEYS)
REQUESTS = st.one_of(
    st.builds(wire.OpenNamespace, NUMBERS, RECORDS),
    st.builds(wire.ProbeChain, *ABOUT_CHAINS),
    st.builds(wire.Acquire, *ABOUT_CHAINS, SECONDS),
    st.builds(wire.Release, NUMBERS),
    st.builds(wire.Reserve, *ABOUT_CHAINS, PRIORITY, TTL),
    st.builds(wire.Commit, NUMBERS, NUMBERS, NUMBERS),
    st.builds(wire.Abort, NUMBERS),
    st.builds(wire.Prefetch, *ABOUT_CHAINS),
    st.builds(wire.Retain, *ABOUT_CHAINS, PRIORITY, TTL),
    st.builds(wire.Evict, NUMBERS, NUMBERS, PARENTS, st.just(b"")),
    st.builds(wire.Explain, *ABOUT_CHAINS),
    st.builds(wire.GetStats, NUMBERS),
    st.builds(wire.Flush, NUMBERS, st.just(0.0)),
).map(wire.encode)
# A good hello and an open namespace, so that most of what follows gets somewhere.
OPENED = wire.encode(HELLO) + wire.encode(wire.OpenNamespace(1, NAMESPACE.to_json()))


Served = tuple[Rig, Daemon, StoreClient]
# One daemon for all examples.
many = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def served(rig: Rig, daemon: Daemon, client: StoreClient) -> Served:
    """A daemon with some blocks, and a client of it that behaves."""
    put_behind(rig, KNOWN)
    return rig, daemon, client


@many
@given(
    st.lists(REQUESTS, max_size=25),
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
    rig, daemon, client = served
    with RawClient(daemon, hello=b"") as raw, contextlib.suppress(BrokenPipeError):
        for start in range(0, len(data), step):
            raw.send(data[start : start + step])
        with client.acquire(KNOWN) as lease:
            lease.wait()
            assert check_bytes(lease, KNOWN) == len(lease)
    daemon.until(lambda: len(daemon.service.sessions) == 1 and not daemon.door._greetings)
    assert not daemon.service._watchers
    put(client, KNOWN)
    rig.until(rig.is_quiet)
    rig.store.check_invariants()
    assert rig.ram.slots.space.used_bytes == len(rig.ram.slots) * BLOCK

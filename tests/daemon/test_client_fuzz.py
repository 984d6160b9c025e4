"""Whatever answers in a daemon's place: a client misses, and stays within the arena."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore import wire
from kvstore.client.client import StoreClient
from kvstore.errors import KVStoreError, RightsError, WireError
from kvstore.retention import Retention
from kvstore.tier import Miss
from kvstore.verbs import Store
from tests.daemon.fake_daemon import ARENA_BYTES, FakeDaemon
from tests.store.rig import BLOCK, chain

BLOCKS = chain(3)
HASTY_S = 0.05
NO_MORE = wire.encode(wire.Failed(0, "WireError", "that was all"))


def offsets(*places: int) -> bytes:
    return struct.pack(f"<{len(places)}Q", *places)


def numbers(*places: int) -> bytes:
    return struct.pack(f"<{len(places)}I", *places)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path / "fake.sock", lambda request: NO_MORE) as fake:
        yield fake


def probe(store: Store) -> None:
    assert store.probe(BLOCKS).prefix <= 3


def acquire(store: Store) -> None:
    with store.acquire(BLOCKS, deadline_s=0.0) as lease:
        assert lease.ready() <= lease.wait() <= len(lease.sources) == len(lease)
        assert {len(view) for view in lease.views} <= {BLOCK}


def reserve(store: Store) -> None:
    with store.reserve(BLOCKS) as reservation:
        assert len(reservation.views) == len(reservation) == len(reservation.indices)
        for view in reservation.views:
            view[:] = bytes(BLOCK)
        reservation.commit()


VERBS: tuple[Callable[[StoreClient], object], ...] = (
    probe,
    acquire,
    reserve,
    lambda store: store.prefetch(BLOCKS),
    lambda store: store.retain(BLOCKS, Retention(50)),
    lambda store: store.evict(BLOCKS),
    lambda store: store.explain(BLOCKS),
    lambda store: store.stats(),
    lambda store: store.flush(0.0),
)


# ---- what must not be believed


@pytest.mark.parametrize(
    ("sources", "places"),
    [
        (b"\1", offsets(ARENA_BYTES - BLOCK + 1)),
        (b"\1", offsets(ARENA_BYTES)),
        (b"\1", offsets((1 << 64) - 1)),
        (b"\1", offsets((1 << 64) - BLOCK)),
        (b"\1", offsets(0, BLOCK)),
        (b"\1", b"half of it"),
        (b"\4", offsets(0)),
        (b"\xff", b""),
    ],
)
def test_leases_that_cannot_be(fake: FakeDaemon, sources: bytes, places: bytes) -> None:
    fake.answer = lambda request: wire.encode(wire.Leased(_seq(request), 1, sources, places, None))
    with fake.connect() as client:
        with client.acquire(BLOCKS) as lease:
            assert (len(lease), lease.views, lease.miss) == (0, [], Miss.BREAKER)
        assert client.probe(BLOCKS).prefix == 0


@pytest.mark.parametrize(
    "progress",
    [
        wire.Progress(1, 4, b"", None),
        wire.Progress(1, 0, b"", None),
        wire.Progress(1, 3, offsets(0, 0, 0), None),
        wire.Progress(1, 3, offsets(ARENA_BYTES), None),
        wire.Progress(1, 2, offsets(0, 0), None),
    ],
)
def test_news_that_cannot_be(fake: FakeDaemon, progress: wire.Progress) -> None:
    """One block of three was ready; that it stays, and nothing comes to it."""

    def answer(request: wire.Request) -> bytes:
        leased = wire.Leased(_seq(request), 1, b"\1\1\1", offsets(BLOCK), None)
        return wire.encode(leased) + wire.encode(progress)

    fake.answer = answer
    with fake.connect() as client, client.acquire(BLOCKS) as lease:
        assert lease.wait() == len(lease) == len(lease.views) == 1
        assert lease.miss is Miss.BREAKER


def test_news_of_leases_that_nobody_has(fake: FakeDaemon) -> None:
    fake.answer = lambda request: (
        wire.encode(wire.Progress(99, 1, offsets(1 << 60), "unheard of"))
        + wire.encode(wire.Counted(12345, 7))
        + wire.encode(wire.Counted(_seq(request), 3))
    )
    with fake.connect() as client:
        assert client.evict(BLOCKS) == 3


def test_reasons_of_a_newer_daemon(fake: FakeDaemon) -> None:
    fake.answer = lambda request: wire.encode(wire.Leased(_seq(request), 1, b"", b"", "tired"))
    with fake.connect() as client:
        assert client.acquire(BLOCKS).miss is Miss.ABSENT


@pytest.mark.parametrize(
    ("indices", "places"),
    [
        (numbers(0), offsets(ARENA_BYTES - BLOCK + 1)),
        (numbers(0, 1), offsets(0)),
        (numbers(0), b""),
        (numbers(3), offsets(0)),
        (numbers(1, 0), offsets(0, BLOCK)),
        (numbers(1, 1), offsets(0, BLOCK)),
        (b"half", offsets(0, BLOCK)),
    ],
)
def test_reservations_that_cannot_be(fake: FakeDaemon, indices: bytes, places: bytes) -> None:
    fake.answer = lambda request: wire.encode(wire.Reserved(_seq(request), 1, indices, places))
    with fake.connect() as client:
        assert client.reserve(BLOCKS).views == []
        assert client.probe(BLOCKS).prefix == 0


@pytest.mark.parametrize("verb", VERBS)
def test_answers_to_other_questions(
    fake: FakeDaemon, verb: Callable[[StoreClient], object]
) -> None:
    fake.answer = lambda request: wire.encode(wire.NamespaceOpened(_seq(request), 1))
    with fake.connect() as client:
        verb(client)
        assert not client.flush(0.0)


@pytest.mark.parametrize("fields", [{}, {"ram": 1}, {"unknown": 1}, {"accepted": 1}, {"a b": 1}])
def test_answers_without_sense(fake: FakeDaemon, fields: dict[str, Any]) -> None:
    fake.answer = lambda request: wire.encode(wire.Answered(_seq(request), fields))
    with fake.connect() as client:
        assert client.stats().counters == {}
    with fake.connect() as client:
        assert client.explain(BLOCKS).reason == "breaker"
    with fake.connect() as client:
        assert client.retain(BLOCKS, Retention(50)).absent == 3


def test_a_probe_of_another_length(fake: FakeDaemon) -> None:
    fake.answer = lambda request: wire.encode(
        wire.Probed(_seq(request), b"\1\1\1\1", 0, 0.0, 0.0, 0)
    )
    with fake.connect() as client:
        assert client.probe(BLOCKS).tiers == [None] * 3


@pytest.mark.parametrize(
    ("kind", "raised"), [("RightsError", RightsError), ("SystemExit", KVStoreError), ("", None)]
)
def test_refusals_are_raised(
    fake: FakeDaemon, kind: str, raised: type[KVStoreError] | None
) -> None:
    fake.answer = lambda request: wire.encode(wire.Failed(_seq(request), kind, "no"))
    with fake.connect() as client, pytest.raises(raised or KVStoreError, match="no"):
        client.probe(BLOCKS)


@pytest.mark.parametrize(
    "welcome",
    [
        wire.Welcome(wire.VERSION, "fake", 0),
        wire.Welcome(wire.VERSION, "fake", ARENA_BYTES + 1),
        wire.Welcome(wire.VERSION + 1, "fake", ARENA_BYTES),
        wire.Failed(0, "WireError", "go away"),
        wire.Counted(1, 1),
    ],
)
def test_no_such_welcome(fake: FakeDaemon, welcome: Any) -> None:
    fake.welcome = welcome
    with pytest.raises(WireError):
        fake.connect()


# ---- what may be anything


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_answers(fake: FakeDaemon, data: st.DataObject) -> None:
    """Well-formed ones of all kinds, damaged ones, and bytes; then nothing more."""
    packed = st.binary(max_size=24) | st.lists(st.integers(0, 2 * ARENA_BYTES), max_size=4).map(
        lambda places: offsets(*places)
    )
    short = st.binary(max_size=4)
    number = st.integers(0, 4)
    miss = st.none() | st.sampled_from(["deadline", "absent", "?"])
    seq = st.integers(0, 4)
    replies = st.one_of(
        st.builds(wire.Probed, seq, short, number, st.floats(), st.floats(), number),
        st.builds(wire.Leased, seq, number, short, packed, miss),
        st.builds(wire.Progress, number, number, packed, miss),
        st.builds(wire.Reserved, seq, number, packed, packed),
        st.builds(wire.Counted, seq, number),
        st.builds(wire.Answered, seq, st.dictionaries(st.text(max_size=3), number)),
        st.builds(wire.Failed, seq, st.sampled_from(["RequestError", "X"]), st.text(max_size=5)),
    ).map(wire.encode)
    answers = data.draw(st.lists(st.lists(replies | short, max_size=4).map(b"".join), max_size=4))
    coming = iter(answers)
    fake.answer = lambda request: next(coming, b"") + NO_MORE
    with fake.connect(HASTY_S) as client:  # half a frame is waited for
        for verb in data.draw(st.lists(st.sampled_from(VERBS), max_size=3)):
            with contextlib.suppress(KVStoreError):  # what the daemon has refused
                verb(client)


def _seq(request: wire.Request) -> int:
    return int(getattr(request, "seq", 0))

"""What a client may say and do at the local door, and what it gets for it."""

from __future__ import annotations

import dataclasses
import json
import resource
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore import wire
from kvstore.client import link
from kvstore.client.client import StoreClient
from kvstore.daemon import connection, session
from kvstore.daemon.service import Limits
from kvstore.errors import RequestError
from kvstore.tier import Miss
from tests.daemon.doors import Daemon
from tests.daemon.raw_client import HELLO, RawClient
from tests.daemon.subjects import others_are_served, pinned, put_behind
from tests.store.rig import BLOCK, NAMESPACE, Rig, chain, get, put


@pytest.fixture
def raw(daemon: Daemon) -> Iterator[RawClient]:
    with RawClient(daemon) as raw:
        yield raw


# ---- hello


def test_the_door_is_this_users_alone(daemon: Daemon, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "kvstore.sock").stat().st_mode) == 0o600


def test_a_client_is_given_the_arena(raw: RawClient, rig: Rig) -> None:
    assert isinstance(raw.welcome, wire.Welcome)
    assert (raw.welcome.version, raw.fds) == (wire.VERSION, 1)
    assert raw.welcome.arena_bytes == len(rig.ram.buffer)


@pytest.mark.parametrize(
    ("hello", "said"),
    [
        (wire.encode(wire.Hello(wire.VERSION + 1, "c")), "install the same kvstore"),
        (wire.encode(wire.GetStats(1)), "must be a hello"),
        (b"\x05\x00\x00\x00hello", "not a request"),
        (b"\xff\xff\xff\xff", "longer than allowed"),
        (b"GET / HTTP/1.1\r\n\r\n", "longer than allowed"),
    ],
)
def test_who_does_not_say_hello_is_sent_away(daemon: Daemon, hello: bytes, said: str) -> None:
    with RawClient(daemon, hello=hello) as raw:
        assert isinstance(raw.welcome, wire.Failed)
        assert said in raw.welcome.message
        assert raw.fds == 0
        assert raw.hear() is None
    assert not daemon.service.sessions
    others_are_served(daemon)


@pytest.mark.parametrize("nbytes", [0, 3, 6])
def test_who_leaves_before_hello_leaves_nothing(daemon: Daemon, nbytes: int) -> None:
    with RawClient(daemon, hello=b"") as raw:
        raw.send(wire.encode(HELLO)[:nbytes])
        others_are_served(daemon)
    daemon.until(lambda: not daemon.door._greetings)
    assert not daemon.service.sessions


def test_hello_may_come_in_pieces_and_with_more(daemon: Daemon) -> None:
    with RawClient(daemon, hello=b"") as raw:
        frames = wire.encode(HELLO) + wire.encode(wire.GetStats(5))
        for i in range(len(frames)):
            raw.send(frames[i : i + 1])
        assert isinstance(raw.hear(), wire.Welcome)
        assert isinstance(raw.hear(), wire.Answered)


def test_the_door_closes_on_whoever_has_come_so_far(daemon: Daemon) -> None:
    """Not greeted yet, half through hello, connected: all are told, and nobody is waited for."""
    with RawClient(daemon, hello=b"") as silent, RawClient(daemon, hello=b"") as halting:
        halting.send(wire.encode(HELLO)[:3])
        with RawClient(daemon) as connected, RawClient(daemon, hello=b"") as late:
            late.send(wire.encode(HELLO))
            daemon.close()
            for each in (silent, halting, connected):
                assert each.hear() is None
            while late.hear() is not None:
                pass
    assert not daemon.service.sessions


def test_who_cannot_be_let_in_now_is_later(daemon: Daemon, client: StoreClient) -> None:
    """No descriptors are left for a new connection; those who are in go on."""
    assert put(client, chain(2)) == 2
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    waiting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with waiting:
        resource.setrlimit(resource.RLIMIT_NOFILE, (waiting.fileno() + 1, limits[1]))
        try:
            waiting.connect(daemon.url.removeprefix("unix://"))
            daemon.until(lambda: daemon.door._pause is not None)
            assert get(client, chain(2)) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        waiting.sendall(wire.encode(HELLO))
        assert len(waiting.recv(100)) > 0
    others_are_served(daemon)


# ---- frames


def test_frames_in_pieces_and_frames_in_heaps(raw: RawClient, rig: Rig) -> None:
    put_behind(rig, chain(4))
    raw.open()
    keys = wire.pack_keys(chain(4).keys)
    frame = wire.encode(wire.ProbeChain(2, 0, chain(4).parent, keys))
    for i in range(0, len(frame), 7):
        raw.send(frame[i : i + 7])
    probed = raw.hear()
    assert isinstance(probed, wire.Probed)
    assert probed.tiers == bytes([1] * 4)
    raw.send(b"".join(wire.encode(wire.GetStats(seq)) for seq in range(1, 1001)))
    assert [getattr(raw.hear(), "seq", None) for _ in range(1000)] == list(range(1, 1001))


@pytest.mark.parametrize(
    "data",
    [
        b"\x03\x00\x00\x00abc",
        b"\x00\x00\x00\x00",
        wire.encode(HELLO),
        wire.encode(wire.Evict(9, 0, NAMESPACE.fingerprint, b"half a key")),
    ],
)
def test_who_breaks_the_protocol_is_not_heard_but_keeps_his_lease(
    daemon: Daemon, raw: RawClient, rig: Rig, data: bytes
) -> None:
    """He may be reading: only he can say that he is not."""
    put_behind(rig, chain(4))
    raw.open()
    leased = raw.acquire(chain(4))
    raw.send(data + wire.encode(wire.Release(leased.lease)))
    answer = raw.hear()
    assert isinstance(answer, wire.Failed)
    assert (answer.seq, answer.kind) == (0, "WireError")
    assert raw.hear() is None
    raw.send(wire.encode(wire.Release(leased.lease)))
    others_are_served(daemon)
    assert rig.column("pins", chain(4)) == [1] * 4
    raw.close()
    daemon.until(lambda: not daemon.service.sessions)
    rig.until(rig.is_quiet)


def test_a_client_that_reads_no_replies_gets_no_more(
    daemon: Daemon, raw: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "UNSENT_BYTES", 100_000)
    raw.open()
    (there,) = daemon.door._connections
    raw.socket.setblocking(False)
    frames = b"".join(wire.encode(wire.GetStats(seq)) for seq in range(100))
    while not there._over:
        try:
            raw.socket.send(frames)
        except BlockingIOError:
            daemon.call(lambda: None)
    others_are_served(daemon)
    transport = there._transport
    assert transport is not None
    assert transport.get_write_buffer_size() < 200_000
    raw.socket.setblocking(True)
    while raw.hear() is not None:
        pass


def test_a_flood_of_what_takes_time_is_answered(
    daemon: Daemon, raw: RawClient, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than are answered at once, and nothing is refused or forgotten meanwhile."""
    monkeypatch.setattr(connection, "UNANSWERED", 4)
    put_behind(rig, chain(4))
    raw.open()
    leased, reserved = raw.acquire(chain(4)), raw.reserve(chain(2, seed=1))
    with daemon.wedged():
        raw.say(
            *(wire.Flush(seq, 1.0) for seq in range(1, 101)),
            wire.Release(leased.lease),
            wire.Commit(101, reserved.reservation),
        )
    answers = [raw.hear() for _ in range(101)]
    assert {getattr(answer, "seq", 0) for answer in answers} == set(range(1, 102))
    assert all(isinstance(answer, wire.Counted) for answer in answers)
    assert rig.store.probe(chain(2, seed=1)).prefix == 2
    rig.until(rig.is_quiet)


def test_a_client_that_leaves_with_answers_to_come(daemon: Daemon, rig: Rig) -> None:
    rig.gate.hold("write")
    put(rig.store, chain(4))
    with RawClient(daemon) as raw:
        raw.say(*(wire.Flush(seq, 1.0) for seq in range(1, 50)))
    daemon.until(lambda: not daemon.service.sessions)
    rig.gate.release()
    others_are_served(daemon)


# ---- requests that make no sense


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 0},
        {"layers": 1.5},
        {"layers": True},
        {"layers": 10**4000},
        {"layers": 1 << 50},
        {"model": ["m"]},
        {"kv_dtype": []},
        {"kv_dtype": "float3"},
        {"unknown": 1},
        {"salt": None},
    ],
)
def test_no_namespace(raw: RawClient, daemon: Daemon, changes: dict[str, object]) -> None:
    record = json.dumps({**json.loads(NAMESPACE.to_json()), **changes})
    refused(raw, wire.OpenNamespace(1, record))


@pytest.mark.parametrize("record", ["", "1", "null", "[" * 16_000, "\ud83d", '{"a": NaN}'[:-1]])
def test_no_record(raw: RawClient, record: str) -> None:
    refused(raw, wire.OpenNamespace(1, record.encode("utf-8", "ignore").decode()))


def test_no_such_number(raw: RawClient) -> None:
    raw.open()
    refused(raw, wire.ProbeChain(2, 1, b"p" * 16, b""))
    refused(raw, wire.Commit(2, 99))
    refused(raw, wire.Retain(2, 0, b"p" * 16, b"", 50, 0.0))
    raw.say(wire.Release(99), wire.Abort(99))
    assert isinstance(raw.ask(wire.GetStats(3)), wire.Answered)


def test_of_too_many_namespaces_the_first_is_forgotten(
    raw: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MAX_NAMESPACES", 1)
    raw.open()
    raw.open()
    other = NAMESPACE.to_json().replace("tiny", "other")
    assert raw.ask(wire.OpenNamespace(1, other)) == wire.NamespaceOpened(1, 1)
    refused(raw, wire.ProbeChain(2, 0, b"p" * 16, b""))
    assert raw.ask(wire.OpenNamespace(3, NAMESPACE.to_json())) == wire.NamespaceOpened(3, 2)
    assert isinstance(raw.ask(wire.ProbeChain(4, 2, b"p" * 16, b"")), wire.Probed)
    refused(raw, wire.ProbeChain(5, 1, b"p" * 16, b""))


def test_a_client_may_use_more_namespaces_than_are_remembered(
    client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MAX_NAMESPACES", 4)
    monkeypatch.setattr(link, "KEPT_NAMESPACES", 2)
    salted = [dataclasses.replace(NAMESPACE, salt=str(number)) for number in range(9)]
    for each in salted * 2:
        put(client, chain(2, namespace=each))
    assert [get(client, chain(2, namespace=each)) for each in salted] == [2] * 9


def test_an_answer_that_is_too_long_is_refused_and_no_more(
    rig: Rig, raw: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 16_000)
    put(rig.store, chain(1, namespace=dataclasses.replace(NAMESPACE, rope="r" * 16_000)))
    refused(raw, wire.ListNamespaces(1))
    refused(raw, wire.GetStatus(2))


def refused(raw: RawClient, request: wire.Request) -> None:
    """With an error that the client understands; and the conversation goes on."""
    answer = raw.ask(request)
    assert isinstance(answer, wire.Failed)
    assert (answer.seq, answer.kind) == (request.seq, "RequestError")  # type: ignore[union-attr]
    assert isinstance(raw.ask(wire.GetStats(77)), wire.Answered)


def test_a_reservation_of_another_connection_is_not_mine(daemon: Daemon, raw: RawClient) -> None:
    raw.open()
    reserved = raw.reserve(chain(2))
    with RawClient(daemon) as other:
        refused(other, wire.Commit(1, reserved.reservation))
        other.say(wire.Abort(reserved.reservation))
        assert isinstance(other.ask(wire.GetStats(1)), wire.Answered)
    assert raw.ask(wire.Commit(4, reserved.reservation)) == wire.Counted(4, 2)


# ---- bounds


@pytest.mark.parametrize("limits", [Limits(in_flight_bytes=5 * BLOCK)])
def test_no_more_in_flight_than_allowed(daemon: Daemon, client: StoreClient, rig: Rig) -> None:
    put_behind(rig, chain(8))
    with client.acquire(chain(8)) as lease, client.reserve(chain(3, seed=1)) as reservation:
        assert (len(lease), lease.miss) == (5, Miss.TOO_SLOW)
        assert len(reservation) == 0
        with client.acquire(chain(8)) as more:
            assert (len(more), more.miss) == (0, Miss.TOO_SLOW)
    with client.reserve(chain(8, seed=1)) as reservation:
        assert len(reservation) == 5
    client.probe(chain(1))
    counted = daemon.service.tenant_blocks["local"]
    assert counted == {"asked": 16, "hit_ram": 5, "miss_too_slow": 11}


def test_no_more_held_than_allowed(
    daemon: Daemon, raw: RawClient, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MAX_HELD", 3)
    put_behind(rig, chain(2))
    raw.open()
    leases = [raw.acquire(chain(1)) for _ in range(3)]
    assert [len(each.sources) for each in leases] == [1, 1, 1]
    none = raw.acquire(chain(1))
    assert (none.sources, none.miss) == (b"", "too_slow")
    assert raw.reserve(chain(1, seed=1)).indices == b""
    (held,) = daemon.service.sessions
    assert len(held.leases) == 3
    raw.say(wire.Release(leases[0].lease))
    assert len(raw.acquire(chain(1)).sources) == 1


def test_misses_leave_nothing_behind(daemon: Daemon, raw: RawClient, rig: Rig) -> None:
    raw.open()
    for seed in range(50):
        assert raw.acquire(chain(2, seed)).sources == b""
    (held,) = daemon.service.sessions
    assert not held.leases
    put_behind(rig, chain(64))
    with daemon.connect() as client, client.acquire(chain(64)):
        for seed in range(1, 50):
            assert raw.reserve(chain(2, seed)).indices == b""
    assert not held.reservations
    daemon.until(lambda: pinned(rig) == 0)


def test_deadlines_leave_no_timers_behind(daemon: Daemon, raw: RawClient, rig: Rig) -> None:
    rig.store_below(chain(2))
    raw.open()
    rig.gate.hold("read")
    for seq in range(1, 301):
        keys = wire.pack_keys(chain(2).keys)
        leased = raw.ask(wire.Acquire(seq, 0, chain(2).parent, keys, 1e9))
        assert isinstance(leased, wire.Leased)
        raw.say(wire.Release(leased.lease))
    raw.ask(wire.GetStats(301))
    rig.gate.release()
    timers = daemon._loop._scheduled  # type: ignore[attr-defined]
    assert len(timers) < 200


def test_a_refusal_is_raised_where_it_was_asked(daemon: Daemon) -> None:
    with daemon.connect() as client:
        client.probe(chain(1))
        link = client._link
        assert link is not None
        with pytest.raises(RequestError, match="not open"):
            link.ask_alone(wire.Commit, reservation=99)
        assert client.is_connected

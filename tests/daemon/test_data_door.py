"""The data door: blocks over TCP, and clients that die, dawdle or break the protocol."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvstore import wire
from kvstore.client.client import StoreClient
from kvstore.compose import connect
from kvstore.daemon.data_connection import UNANSWERED
from kvstore.daemon.service import Limits
from kvstore.errors import RequestError
from kvstore.hashing import Chain
from kvstore.tier import Miss
from tests.daemon.data_doors import DataDaemon, RawClient, ended
from tests.store.rig import (
    BLOCK,
    NAMESPACE,
    PATIENCE_S,
    Rig,
    RunningClock,
    chain,
    check_bytes,
    content,
    fill,
    get,
    put,
)

# 24 of them are more than the kernel takes for a client that does not read.
LARGE = dataclasses.replace(NAMESPACE, layers=128)
LARGE_BYTES = LARGE.layout.block_bytes  # 1 MiB


@pytest.fixture
def data_daemon(rig: Rig, limits: Limits | None) -> Iterator[DataDaemon]:
    with DataDaemon(rig.store, limits=limits) as daemon:
        yield daemon


@pytest.fixture
def remote(data_daemon: DataDaemon) -> Iterator[StoreClient]:
    with data_daemon.connect() as client:
        yield client


@pytest.fixture
def raw(data_daemon: DataDaemon) -> Iterator[RawClient]:
    with RawClient(data_daemon) as raw:
        assert isinstance(raw.hear(), wire.Welcome)
        yield raw


@pytest.fixture
def large_daemon() -> Iterator[DataDaemon]:
    """24 large blocks of one chain in its RAM, and room for as many."""
    rig = Rig(None, ram_blocks=48 * LARGE_BYTES // BLOCK, clock=RunningClock())
    put(rig.store, chain(24, namespace=LARGE))
    with DataDaemon(rig.store) as daemon:
        yield daemon
    rig.finish()


def pinned(daemon: DataDaemon) -> int:
    return daemon.store.stats().ram["pinned_blocks"]


def used_bytes(daemon: DataDaemon) -> int:
    return daemon.store.stats().ram["used_bytes"]


def test_blocks_go_there_and_back(rig: Rig, remote: StoreClient) -> None:
    blocks = chain(5)
    assert put(remote, blocks) == 5
    assert get(rig.store, blocks) == 5
    assert get(remote, blocks) == 5
    assert remote.probe(chain(7)).tiers == ["remote"] * 5 + [None] * 2


def test_to_an_engine_they_are_remote_and_what_they_cost_is_measured(
    rig: Rig, remote: StoreClient
) -> None:
    put(rig.store, chain(5))
    assert remote.load_costs["remote"].observations == 0
    with remote.acquire(chain(5)) as lease:
        assert lease.wait() == 5
        assert lease.sources == ["remote"] * 5
    assert remote.load_costs["remote"].observations == 1
    assert remote.load_costs["remote"].seconds(1, 5 * BLOCK) is not None
    assert remote.queued_bytes() == {"remote": 0}


def test_blocks_come_as_nvme_brings_them(rig: Rig, remote: StoreClient) -> None:
    rig.store_below(chain(4))
    put(rig.store, chain(2))
    rig.gate.hold("read")
    with remote.acquire(chain(4)) as lease:
        assert lease.wait(2) == 2
        rig.gate.arrived("read")
        assert (lease.ready(), len(lease)) == (2, 4)
        assert remote.queued_bytes() == {"remote": 2 * BLOCK}
        rig.gate.release()
        assert lease.wait() == 4
        assert check_bytes(lease, chain(4)) == 4


def test_what_is_late_is_cut_and_costs_nobody_else(rig: Rig, remote: StoreClient) -> None:
    rig.store_below(chain(4))
    put(rig.store, chain(2))
    rig.gate.hold("read")
    with remote.acquire(chain(4), deadline_s=0.5) as lease:
        assert lease.wait() == 2
        assert (len(lease), lease.miss) == (2, Miss.DEADLINE)
        assert check_bytes(lease, chain(4)) == 2
    rig.gate.release()
    assert get(remote, chain(2)) == 2


def test_a_lease_holds_nothing_of_the_daemon_once_it_is_here(
    rig: Rig, data_daemon: DataDaemon, remote: StoreClient
) -> None:
    put(rig.store, chain(3))
    with remote.acquire(chain(3)) as lease:
        assert lease.wait() == 3
        data_daemon.until(lambda: not pinned(data_daemon))
        assert remote.evict(chain(3)) == 3
        data_daemon.close()
        assert check_bytes(lease, chain(3)) == 3


def test_a_block_is_pinned_until_it_has_gone_out(large_daemon: DataDaemon) -> None:
    blocks = chain(24, namespace=LARGE)
    with RawClient(large_daemon) as raw:
        raw.hear()
        leased = raw.about(wire.Acquire, blocks)
        assert leased.sources == b"\x01" * 24
        assert pinned(large_daemon) == 24
        got = 0
        while got < 24:
            payload = raw.hear()
            assert isinstance(payload, wire.Payload)
            for key in blocks.keys[got : got + payload.blocks]:
                assert raw.take(LARGE_BYTES) == content(key, LARGE_BYTES)
            got += payload.blocks
        large_daemon.until(lambda: not pinned(large_daemon))


def stats_after(raw: RawClient, seq: int) -> int:
    """How many blocks came before the answer; they are taken in."""
    raw.say(wire.GetStats(seq))
    blocks = 0
    while not isinstance(reply := raw.hear(), wire.Answered):
        assert isinstance(reply, wire.Payload)
        raw.take(reply.payload_bytes)
        blocks += reply.blocks
    return blocks


def test_who_wants_no_more_gets_no_more(large_daemon: DataDaemon) -> None:
    with RawClient(large_daemon) as raw:
        raw.hear()
        leased = raw.about(wire.Acquire, chain(24, namespace=LARGE))
        raw.say(wire.Release(leased.lease))
        # Words overtake blocks, but for the piece that is being sent: six would let all through.
        assert sum(stats_after(raw, seq) for seq in range(99, 105)) < 24
        large_daemon.until(lambda: not pinned(large_daemon))


def test_blocks_that_are_being_sent_stay_pinned(large_daemon: DataDaemon) -> None:
    with RawClient(large_daemon) as raw:
        raw.hear()
        leased = raw.about(wire.Acquire, chain(24, namespace=LARGE))
        number = raw.open(chain(1, namespace=LARGE))
        (session,) = large_daemon.service.sessions
        large_daemon.until(lambda: writer_is_stuck(large_daemon))
        raw.say(wire.Release(leased.lease))
        keys = wire.pack_keys(chain(1, 1, LARGE).keys)
        raw.say(wire.Reserve(98, number, LARGE.fingerprint, keys, 35, None))
        large_daemon.until(lambda: bool(session.reservations))  # so the release was heard before
        assert pinned(large_daemon) == 24
        raw.say(wire.Abort(next(iter(session.reservations))))
        raw.socket.settimeout(None)
        while not isinstance(reply := raw.hear(), wire.Reserved):
            assert isinstance(reply, wire.Payload)
            raw.take(reply.payload_bytes)
        large_daemon.until(lambda: not pinned(large_daemon))


def writer_is_stuck(daemon: DataDaemon) -> bool:
    """Whether a piece of a lease is on its way, as it stays while the client does not read."""
    (connection,) = daemon.data_door._connections
    return connection._outbox._sending is not None


def test_pins_are_back_when_a_client_dies_mid_stream(large_daemon: DataDaemon) -> None:
    raw = RawClient(large_daemon)
    raw.hear()
    raw.about(wire.Acquire, chain(24, namespace=LARGE))
    assert pinned(large_daemon) == 24
    raw.close()
    large_daemon.until(lambda: not pinned(large_daemon) and not large_daemon.service.sessions)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9999])
def test_slots_are_back_when_a_client_dies_in_a_commit(
    large_daemon: DataDaemon, share: float
) -> None:
    before = used_bytes(large_daemon)
    raw = RawClient(large_daemon)
    raw.hear()
    reserved = raw.about(wire.Reserve, chain(8, 1, LARGE), 35, None)
    nbytes = 8 * LARGE_BYTES
    assert used_bytes(large_daemon) == before + nbytes
    raw.say(wire.Commit(9, reserved.reservation, nbytes), bytes(int(share * nbytes)))
    raw.close()
    large_daemon.until(lambda: not large_daemon.service.sessions)
    assert used_bytes(large_daemon) == before
    assert large_daemon.store.probe(chain(8, 1, LARGE)).prefix == 0


def lie_about_bytes(raw: RawClient, reserved: wire.Reserved) -> None:
    raw.say(wire.Commit(9, reserved.reservation, 3 * BLOCK), bytes(3 * BLOCK))


def announce_less(raw: RawClient, reserved: wire.Reserved) -> None:
    raw.say(wire.Commit(9, reserved.reservation, BLOCK), bytes(2 * BLOCK))


def announce_nothing(raw: RawClient, reserved: wire.Reserved) -> None:
    raw.say(wire.Commit(9, reserved.reservation), bytes(2 * BLOCK))


def name_another(raw: RawClient, reserved: wire.Reserved) -> None:
    raw.say(wire.Commit(9, reserved.reservation + 1, 2 * BLOCK), bytes(2 * BLOCK))


def abort_before(raw: RawClient, reserved: wire.Reserved) -> None:
    raw.say(wire.Abort(reserved.reservation))
    raw.say(wire.Commit(9, reserved.reservation, 2 * BLOCK), bytes(2 * BLOCK))


def talk_nonsense(raw: RawClient, reserved: wire.Reserved) -> None:
    raw.socket.sendall(b"\x10\0\0\0" + bytes(16))


def announce_a_huge_frame(raw: RawClient, reserved: wire.Reserved) -> None:
    raw.socket.sendall(b"\xff\xff\xff\xff")


@pytest.mark.parametrize(
    "lie",
    [
        lie_about_bytes,
        announce_less,
        announce_nothing,
        name_another,
        abort_before,
        talk_nonsense,
        announce_a_huge_frame,
    ],
)
def test_who_breaks_the_protocol_is_told_and_leaves_nothing(
    rig: Rig, data_daemon: DataDaemon, raw: RawClient, lie: Callable[[RawClient, Any], None]
) -> None:
    lie(raw, raw.about(wire.Reserve, chain(2), 35, None))
    told = raw.hear()
    assert isinstance(told, wire.Failed)
    assert (told.seq, told.kind) == (0, "WireError")
    assert raw.ended()
    data_daemon.until(lambda: not data_daemon.service.sessions)
    assert used_bytes(data_daemon) == 0
    assert rig.store.probe(chain(2)).prefix == 0


def test_who_breaks_the_protocol_again_and_again_is_gone_all_the_same(
    data_daemon: DataDaemon, raw: RawClient
) -> None:
    with data_daemon.wedged():  # so that all are read before the first is found to be wrong
        raw.socket.sendall(2 * UNANSWERED * wire.encode(wire.Hello(wire.VERSION, "again")))
    assert raw.ended()
    data_daemon.until(lambda: not data_daemon.service.sessions)


@pytest.mark.parametrize(
    "first",
    [
        wire.encode(wire.GetStats(1)),
        wire.encode(wire.Hello(99, "newer")),
        b"GET / HTTP/1.1\r\n\r\n",
        (1 << 20).to_bytes(4, "little") + bytes(1 << 20),
    ],
)
def test_who_does_not_say_hello_is_sent_away(data_daemon: DataDaemon, first: bytes) -> None:
    with socket.create_connection(data_daemon.endpoint, PATIENCE_S) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(first)
        assert ended(sock)
    assert not data_daemon.service.sessions


def test_a_lease_goes_on_while_another_client_breaks(
    rig: Rig, remote: StoreClient, raw: RawClient
) -> None:
    put(rig.store, chain(5))
    with remote.acquire(chain(5)) as lease:
        talk_nonsense(raw, wire.Reserved(0, 0, b"", b""))
        assert raw.ended()
        assert lease.wait() == 5
    assert get(remote, chain(5)) == 5


@pytest.mark.parametrize("limits", [Limits(in_flight_bytes=3 * BLOCK)])
def test_a_client_that_wants_too_much_gets_less(
    rig: Rig, data_daemon: DataDaemon, remote: StoreClient
) -> None:
    put(rig.store, chain(5))
    assert get(remote, chain(5)) == 3
    (session,) = data_daemon.service.sessions
    data_daemon.until(lambda: session.in_flight_bytes == 0)
    with remote.reserve(chain(5, 1)) as first, remote.reserve(chain(5, 2)) as second:
        assert (len(first), len(second)) == (3, 0)


@pytest.mark.parametrize("limits", [Limits(connections=1)])
def test_too_many_clients_are_refused(remote: StoreClient, data_daemon: DataDaemon) -> None:
    put(remote, chain(1))
    with data_daemon.connect() as other:
        assert not other.is_connected
        assert get(other, chain(1)) == 0
    assert get(remote, chain(1)) == 1


def test_threads_share_a_client(rig: Rig, remote: StoreClient) -> None:
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(5):
                mine = chain(4, 10 * seed + step)
                assert put(remote, mine) == 4
                assert get(remote, mine) == 4
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_without_the_daemon_all_is_a_miss_at_once_and_then_it_is_back(rig: Rig) -> None:
    with DataDaemon(rig.store) as daemon:
        client = daemon.connect()
        put(client, chain(3))
        lease = client.acquire(chain(3))
        lease.wait()
    with client:
        assert check_bytes(lease, chain(3)) == 3
        lease.release()
        with client.acquire(chain(3)) as missed:
            assert (len(missed), missed.miss) == (0, Miss.BREAKER)
        with client.reserve(chain(3)) as reservation:
            assert reservation.indices == []
        with DataDaemon(rig.store, endpoint=daemon.endpoint) as again:
            again.until(lambda: client.is_connected)
            assert get(client, chain(3)) == 3


def test_a_daemon_that_says_nothing_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"kvstore://127.0.0.1:{silent.getsockname()[1]}"
        with connect(url, timeout_s=0.05) as client:
            assert not client.is_connected
            assert client.probe(chain(2)).prefix == 0


def test_a_daemon_that_falls_silent_is_given_up(remote_of_mute: tuple[StoreClient, Chain]) -> None:
    client, blocks = remote_of_mute
    with client.acquire(blocks) as lease:
        assert len(lease) == 0
    assert not client.is_connected


@pytest.fixture
def remote_of_mute() -> Iterator[tuple[StoreClient, Chain]]:
    """A client of a daemon that says welcome, and nothing after that."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        accepted: list[socket.socket] = []

        def welcome() -> None:
            sock, _ = listening.accept()
            sock.sendall(wire.encode(wire.Welcome(wire.VERSION, "mute")))
            accepted.append(sock)

        thread = threading.Thread(target=welcome)
        thread.start()
        with connect(f"kvstore://127.0.0.1:{listening.getsockname()[1]}", timeout_s=0.1) as client:
            thread.join()
            yield client, chain(2)
        accepted[0].close()


def test_an_unused_reservation_goes_back(
    rig: Rig, data_daemon: DataDaemon, remote: StoreClient
) -> None:
    with remote.reserve(chain(3)) as reservation:
        fill(reservation.views, chain(3).keys)
    data_daemon.until(lambda: used_bytes(data_daemon) == 0)
    with pytest.raises(RequestError):
        remote.acquire(Chain(NAMESPACE, NAMESPACE.fingerprint, chain(1).keys * 70_000))

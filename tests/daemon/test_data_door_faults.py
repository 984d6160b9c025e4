"""Clients of the data door that die, dawdle, change their minds or break the protocol."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvstore import wire
from kvstore.client.client import StoreClient
from kvstore.daemon.data_connection import UNANSWERED
from kvstore.daemon.outbox import Outbox
from kvstore.daemon.stream_conversation import StreamConversation
from kvstore.tenant import LOCAL
from tests.daemon.data_doors import (
    LARGE,
    LARGE_BYTES,
    DataDaemon,
    RawClient,
    ended,
    pinned,
    used_bytes,
)
from tests.store.rig import (
    BLOCK,
    PATIENCE_S,
    Rig,
    chain,
    content,
    get,
    put,
)


@pytest.fixture
def remote(data_daemon: DataDaemon) -> Iterator[StoreClient]:
    with data_daemon.connect() as client:
        yield client


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
    with RawClient(large_daemon, receive_bytes=64 << 10) as raw:  # far less than a piece
        raw.hear()
        number = raw.open(chain(1, namespace=LARGE))
        leased = raw.about(wire.Acquire, chain(24, namespace=LARGE))
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
    return bool(connection._outbox._taken)


def test_a_lease_ends_with_the_last_piece_of_it_and_not_with_one_before(
    large_daemon: DataDaemon,
) -> None:
    """One piece has gone out and nobody has heard of it yet, when the next is on its way."""

    def talk() -> list[int]:
        service = large_daemon.service
        session = service.open(LOCAL, "test")
        outbox = Outbox()
        conversation = StreamConversation(service, session, lambda reply: None, outbox)
        asked = chain(24, namespace=LARGE)
        number = session.open_namespace(LARGE.to_json())
        keys = wire.pack_keys(asked.keys)
        leased = conversation.answer(wire.Acquire(1, number, asked.parent, keys))
        assert isinstance(leased, wire.Leased)
        conversation._report()
        first, second = outbox.take(), outbox.take()
        assert first is not None
        assert second is not None
        conversation.answer(wire.Release(leased.lease))
        held = [len(session.leases)]
        for piece in (first, second):
            conversation.sent(leased.lease, piece.blocks)
            held.append(len(session.leases))
        service.end(session)
        return held

    assert large_daemon.call(talk) == [1, 1, 0]


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

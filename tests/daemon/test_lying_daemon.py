"""A daemon elsewhere that lies about blocks: its clients miss, and neither hang nor break."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import pytest

from kvstore import wire
from kvstore.client.client import StoreClient
from kvstore.compose import connect
from kvstore.tier import Miss
from tests.store.rig import BLOCK, PATIENCE_S, chain, content

BLOCKS = chain(3)
Answer = Callable[[Any], bytes]


class FakeStreamDaemon:
    """Welcomes one client after the other, and answers every request as the test wants."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"kvstore://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                with client, contextlib.suppress(OSError):
                    self._converse(client)

    def _converse(self, client: socket.socket) -> None:
        while request := self._hear(client):
            if isinstance(request, wire.Hello):
                client.sendall(wire.encode(wire.Welcome(wire.VERSION, "fake")))
            elif isinstance(request, wire.OpenNamespace):
                client.sendall(wire.encode(wire.NamespaceOpened(request.seq, 0)))
            else:
                client.sendall(self._answer(request))

    def _hear(self, client: socket.socket) -> Any:
        prefix = client.recv(wire.LENGTH_BYTES, socket.MSG_WAITALL)
        if len(prefix) < wire.LENGTH_BYTES:
            return None
        body = client.recv(wire.body_bytes(prefix), socket.MSG_WAITALL)
        request = wire.decode_request(body)
        if isinstance(request, wire.Commit) and request.payload_bytes:
            client.recv(request.payload_bytes, socket.MSG_WAITALL)
        return request

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()


@contextlib.contextmanager
def lied_to(answer: Answer) -> Iterator[StoreClient]:
    with FakeStreamDaemon(answer) as daemon, connect(daemon.url, timeout_s=PATIENCE_S) as client:
        yield client


def payload(blocks: int, nbytes: int, lease: int = 7) -> bytes:
    return wire.encode(wire.Payload(lease, blocks, nbytes)) + bytes(nbytes)


@pytest.mark.parametrize(
    ("sent", "ready"),
    [
        (payload(1, BLOCK - 1), 0),
        (payload(1, BLOCK + 1), 0),
        (payload(4, 4 * BLOCK), 0),
        (payload(2, 2 * BLOCK) + payload(2, 2 * BLOCK), 2),
        (payload(0, BLOCK), 0),
        (wire.encode(wire.Progress(7, 4, b"", None)), 0),
        (payload(2, 2 * BLOCK) + wire.encode(wire.Progress(7, 1, b"", None)), 2),
        (b"\xff\xff\xff\xff", 0),
        (wire.encode(wire.Leased(999, 8, b"\1", b"", None))[:-1], 0),
    ],
)
def test_blocks_that_were_not_leased_end_the_connection(sent: bytes, ready: int) -> None:
    def answer(request: Any) -> bytes:
        leased = wire.encode(wire.Leased(request.seq, 7, b"\1\1\1", b"", None))
        return leased + sent + wire.encode(wire.Failed(0, "WireError", "that was all"))

    with lied_to(answer) as client, client.acquire(BLOCKS) as lease:
        assert lease.wait() == ready
        assert [len(view) for view in lease.views] == [BLOCK] * ready
        assert lease.miss is Miss.BREAKER


@pytest.mark.parametrize("sources", [b"\1" * 4, b"\1" * 65_536, b"\x09"])
def test_leases_of_more_or_other_than_was_asked_for_are_not_taken(sources: bytes) -> None:
    def answer(request: Any) -> bytes:
        return wire.encode(wire.Leased(request.seq, 7, sources, b"", None))

    with lied_to(answer) as client, client.acquire(BLOCKS) as lease:
        assert (len(lease), lease.miss) == (0, Miss.BREAKER)


@pytest.mark.parametrize("indices", [(0, 0), (2, 1), (3,), (0, 1, 2, 3), tuple(range(131_072))])
def test_slots_for_other_blocks_than_asked_for_are_not_taken(indices: tuple[int, ...]) -> None:
    def answer(request: Any) -> bytes:
        packed = struct.pack(f"<{len(indices)}I", *indices)
        return wire.encode(wire.Reserved(request.seq, 7, packed, b""))

    with lied_to(answer) as client, client.reserve(BLOCKS) as reservation:
        assert (len(reservation), list(reservation.views)) == (0, [])
        assert reservation.commit() == 0


def test_blocks_of_leases_that_are_gone_are_passed_over() -> None:
    right = b"".join(content(key) for key in BLOCKS.keys)

    def answer(request: Any) -> bytes:
        if isinstance(request, wire.Release):
            return b""
        leased = wire.encode(wire.Leased(request.seq, 7, b"\1\1\1", b"", None))
        strange = payload(5, 123_456, lease=8) + payload(1, 1, lease=9)
        return leased + strange + wire.encode(wire.Payload(7, 3, 3 * BLOCK)) + right

    with lied_to(answer) as client, client.acquire(BLOCKS) as lease:
        assert lease.wait() == 3
        assert b"".join(map(bytes, lease.views)) == right


def test_a_daemon_that_ends_within_a_block_is_a_miss() -> None:
    def answer(request: Any) -> bytes:
        leased = wire.encode(wire.Leased(request.seq, 7, b"\1\1\1", b"", None))
        cut = wire.encode(wire.Payload(7, 1, BLOCK)) + bytes(BLOCK // 2)
        return leased + payload(1, BLOCK) + cut

    with (
        FakeStreamDaemon(answer) as daemon,
        connect(daemon.url, timeout_s=0.2) as client,
        client.acquire(BLOCKS) as lease,
    ):
        assert lease.wait() == 1
        assert (len(lease), lease.miss) == (1, Miss.BREAKER)

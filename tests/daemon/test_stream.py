"""What is sent in many pieces arrives as one stream, however large they are."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import closing
from threading import Thread

import pytest

from kvstore.stream import CALL_BYTES, PIECES, PlainStream

STALL_S = 30.0


@pytest.fixture
def streams() -> Iterator[tuple[PlainStream, PlainStream]]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname())
        other, _ = listening.accept()
    with closing(PlainStream(one, STALL_S)) as sender, closing(PlainStream(other, STALL_S)) as end:
        yield sender, end


@pytest.mark.parametrize(
    "sizes",
    [
        [0],
        [1, 0, 0, 2],
        [CALL_BYTES, CALL_BYTES],
        [3 * CALL_BYTES + 1, 5, 0, CALL_BYTES - 5, 7],
        [1000] * (2 * PIECES + 1),
        [10_000] * (2 * PIECES + 1),
    ],
    ids=["nothing", "little", "calls", "large", "many", "many and large"],
)
def test_all_pieces_arrive_in_order(
    streams: tuple[PlainStream, PlainStream], sizes: list[int]
) -> None:
    sender, end = streams
    pieces = [random.Random(number).randbytes(size) for number, size in enumerate(sizes)]
    got = memoryview(bytearray(sum(sizes) + 1))
    reading = Thread(target=end.fill, args=(got,))
    reading.start()
    sender.send(pieces)
    sender.send([b"!"])
    reading.join()
    assert bytes(got) == b"".join(pieces) + b"!"

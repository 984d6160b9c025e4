"""What a client of the data door is to be sent: words before blocks, and blocks piece by piece."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

from kvstore import wire
from kvstore.stream import Buffer

PIECE_BYTES = 8 << 20  # of blocks sent at once; a reply waits no longer than for these
UNSENT_BYTES = 16 << 20  # of words that the client does not read; beyond, it gets no more


class Piece(NamedTuple):
    """What goes out at once. `lease` is whose blocks they are; None for words alone."""

    buffers: list[Buffer]
    lease: int | None
    blocks: int


class Outbox:
    """Filled by the event loop, emptied by the one thread that writes. Never waits but in `take`.

    Blocks are views of memory that is leased: whoever gives a lease back asks `drop` first.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._frames: deque[bytes] = deque()
        self._frames_bytes = 0
        self._blocks: deque[tuple[int, memoryview]] = deque()
        self._taken: Counter[int] = Counter()  # blocks of each lease that went out, or are going
        self._ended = False

    def put(self, frame: bytes) -> bool:
        """Words. False where the client reads so little that it is given up."""
        with self._changed:
            if not self._ended:
                self._frames.append(frame)
                self._frames_bytes += len(frame)
                self._changed.notify()
            return self._frames_bytes <= UNSENT_BYTES

    def put_blocks(self, lease: int, views: Sequence[memoryview]) -> None:
        """The next blocks of a lease, in their order."""
        with self._changed:
            if not self._ended:
                self._blocks.extend((lease, view) for view in views)
                self._changed.notify()

    def drop(self, lease: int) -> int:
        """Send no more of a lease; returns how many of its blocks went out, or are going."""
        with self._changed:
            self._blocks = deque(item for item in self._blocks if item[0] != lease)
            return self._taken.pop(lease, 0)

    def finish(self) -> None:
        """Send the words that are here, no blocks, and then nothing."""
        with self._changed:
            self._ended = True
            self._blocks.clear()
            self._changed.notify()

    def take(self) -> Piece | None:
        """Wait for what is to go out now; None at the end."""
        with self._changed:
            while not self._frames and not self._blocks:
                if self._ended:
                    return None
                self._changed.wait()
            if self._frames:
                frames: list[Buffer] = [b"".join(self._frames)]
                self._frames.clear()
                self._frames_bytes = 0
                return Piece(frames, None, 0)
            return self._take_blocks()

    def _take_blocks(self) -> Piece:
        lease = self._blocks[0][0]
        views: list[Buffer] = []
        nbytes = 0
        while self._blocks and self._blocks[0][0] == lease:
            view = self._blocks[0][1]
            if views and nbytes + len(view) > PIECE_BYTES:
                break
            views.append(view)
            nbytes += len(view)
            self._blocks.popleft()
        self._taken[lease] += len(views)
        frame = wire.encode(wire.Payload(lease, len(views), nbytes))
        return Piece([frame, *views], lease, len(views))

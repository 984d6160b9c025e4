"""A connection that block bytes come through, read by a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from kvstore import wire
from kvstore.client.exchange import Exchange
from kvstore.errors import WireError
from kvstore.stream import Buffer, FrameReader, Stream


class Landing(Protocol):
    """Where block bytes go. Both with `turn` held; may raise WireError."""

    def begin_locked(self, payload: wire.Payload) -> memoryview | None:
        """Room for exactly these bytes; None where nobody wants them any more."""
        ...

    def end_locked(self, payload: wire.Payload) -> None:
        """They are there."""
        ...


class StreamConnection(Exchange):
    """Over TCP. A thread takes in what comes as it comes, so that loads go on while others compute.

    Bytes go straight from the socket to where they belong.
    """

    def __init__(
        self,
        stream: Stream,
        frames: FrameReader,
        timeout_s: float,
        pushed: Callable[[wire.Reply], None],
        landing: Landing,
    ) -> None:
        """Owns the stream, of which `frames` has read `Welcome` and nothing more."""
        super().__init__(timeout_s, pushed)
        self._stream = stream
        self._frames = frames
        self._landing = landing
        self._thread = threading.Thread(target=self._read, name="kvstore-stream", daemon=True)
        self._thread.start()

    def wait(self, condition: Callable[[], bool], until_s: float) -> bool:
        """Wait until the condition holds; False at the time `until_s`, or once it is lost."""
        with self.turn:
            while not condition():
                left_s = until_s - time.monotonic()
                if self.lost is not None or left_s <= 0:
                    return False
                self.turn.wait(min(left_s, threading.TIMEOUT_MAX))
            return True

    def drain(self) -> None:
        """The thread has taken in all that has arrived, or is at it."""

    def wake_locked(self) -> None:
        self.turn.notify_all()

    def lose(self, why: str) -> None:
        super().lose(why)
        if not self.is_inherited:  # the parent goes on
            self._stream.shutdown()

    def close(self) -> None:
        """May be called twice, and from the reading thread."""
        self.lose("closed")
        if not self.is_inherited and threading.current_thread() is not self._thread:
            self._thread.join()
        self._stream.close()

    def _send(self, pieces: Sequence[Buffer]) -> None:
        self._stream.send(pieces)

    def _read(self) -> None:
        why = "it has closed the connection"
        try:
            while self._frames.more() and self.lost is None:
                reply = wire.decode_reply(self._frames.frame())
                if isinstance(reply, wire.Payload):
                    self._land(reply)
                    continue
                with self.turn:
                    self._hear(reply)
                    self.turn.notify_all()
        except (WireError, OSError, ValueError) as error:  # ValueError: it was closed meanwhile
            why = f"cannot be heard: {error}"
        self.lose(why)

    def _land(self, payload: wire.Payload) -> None:
        with self.turn:
            room = self._landing.begin_locked(payload)
        if room is None:
            self._frames.skip(payload.payload_bytes)
            return
        self._frames.fill(room)
        with self.turn:
            self._landing.end_locked(payload)
            self.turn.notify_all()

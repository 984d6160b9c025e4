"""Frames in and out of one client's socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from kvstore import wire
from kvstore.daemon.answering import Answering
from kvstore.daemon.conversation import Conversation, failed
from kvstore.errors import WireError

log = logging.getLogger(__name__)

UNSENT_BYTES = 16 << 20  # of replies that a client does not read; beyond, it gets no more
UNANSWERED = 256  # requests of one client that take time; beyond, it is not heard for a while


class Connection(asyncio.Protocol):
    """Splits what arrives into frames, has them answered, and sends the replies.

    What is no message of ours ends the conversation; a request that is refused does not.
    But only the client closes the socket: until then it may be reading the blocks that it
    has leased.
    """

    def __init__(
        self,
        converse: Callable[[Callable[[wire.Reply], None]], Conversation],
        ended: Callable[[], None],
    ) -> None:
        """`ended` is called once, when the client is gone."""
        self._conversation = converse(self.send)
        self._answering = Answering(self._conversation, self.send, self._hear_more)
        self._ended = ended
        self._received = bytearray()
        self._over = False  # nothing is said any more
        self._transport: asyncio.Transport | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # ---- asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self._over:
            self._received += data
            self._hear()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._answering.close()
        self._conversation.close()
        self._ended()
        if not self.closed.done():
            self.closed.set_result(None)

    # ---- ours

    def send(self, reply: wire.Reply) -> None:
        transport = self._transport
        if transport is None or self._over:
            return
        transport.write(wire.encode(reply))
        if transport.get_write_buffer_size() > UNSENT_BYTES:
            log.warning("a client does not read its replies, and gets no more of them")
            self.end()

    def end(self) -> None:
        """Say no more, and wait for the client to close the socket."""
        if self._transport is not None and not self._over:
            self._over = True
            self._received.clear()
            self._transport.resume_reading()  # or we would not hear that it closes
            self._transport.write_eof()

    def close(self) -> None:
        """Close the socket. No block may be overwritten any more while clients have leases."""
        if self._transport is not None:
            self._transport.abort()

    def _hear(self) -> None:
        """Answer what has arrived, as long as not too many answers are still to come."""
        try:
            while len(self._answering) < UNANSWERED and (body := self._next()) is not None:
                self._answering.answer(wire.decode_request(body))
        except WireError as error:
            log.warning("a client broke the protocol, and is not heard any more: %s", error)
            self.send(failed(0, error))
            self.end()
        if self._transport is not None and not self._over:
            if len(self._answering) < UNANSWERED:
                self._transport.resume_reading()
            else:
                self._transport.pause_reading()

    def _next(self) -> bytes | None:
        """The body of the next frame, if all of it is here."""
        received = self._received
        if len(received) < wire.LENGTH_BYTES:
            return None
        end = wire.LENGTH_BYTES + wire.body_bytes(received[: wire.LENGTH_BYTES])
        if len(received) < end:
            return None
        body = bytes(received[wire.LENGTH_BYTES : end])
        del received[:end]
        return body

    def _hear_more(self) -> None:
        if self._transport is not None and not self._over:
            self._hear()

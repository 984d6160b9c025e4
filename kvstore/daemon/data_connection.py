"""One client of the data door: a thread that reads from its socket, and one that writes to it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from kvstore import wire
from kvstore.daemon.answering import Answering
from kvstore.daemon.conversation import failed
from kvstore.daemon.hello import HELLO_S, understood
from kvstore.daemon.outbox import Outbox
from kvstore.daemon.service import Service
from kvstore.daemon.session import Session
from kvstore.daemon.stream_conversation import StreamConversation
from kvstore.daemon.tokens import Tenants
from kvstore.errors import KVStoreError, WireError
from kvstore.stream import FrameReader, PlainStream, Stream, TlsStream, shut
from kvstore.version import __version__

log = logging.getLogger(__name__)

T = TypeVar("T")

HELLO_BYTES = 64 << 10  # who has not yet given a token has no more kept for him
STALL_S = 30.0  # a client that takes or gives no byte for so long, while it should, is given up
UNANSWERED = 256  # requests of one client; beyond, it is not heard for a while


class _Talk(NamedTuple):
    """What there is once the client is known."""

    session: Session
    conversation: StreamConversation
    answering: Answering


class DataConnection:
    """Words are answered in the event loop, which owns the session; bytes move in two threads.

    The reader takes a commit's bytes straight into its slots, the writer sends leased blocks
    straight from theirs. The session ends when both threads have, and no sooner: until then
    they use its memory. Belongs to the event loop's thread, but for what the two do.
    """

    def __init__(
        self,
        service: Service,
        tenants: Tenants,
        tls: ssl.SSLContext | None,
        sock: socket.socket,
        peer: str,
    ) -> None:
        """Owns the socket; all others are borrowed."""
        self._service = service
        self._tenants = tenants
        self._tls = tls
        self._socket = sock
        self._peer = peer
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox()
        self._turns = threading.Semaphore(UNANSWERED)
        self._talk: _Talk | None = None
        self._threads: list[threading.Thread] = []
        self._running = 0
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._hello_timer = self._loop.call_later(HELLO_S, self.close)
        self._start(self._read, "kvstore-data-read")

    def close(self) -> None:
        """End it now. `closed` is done when its threads are."""
        self._outbox.finish()
        shut(self._socket)
        if self._talk is not None:
            self._talk.answering.close()

    def join(self) -> None:
        """Wait for the threads, which have nothing left to do."""
        for thread in self._threads:
            thread.join()

    # ---- in the loop

    def _start(self, work: Callable[[], None], name: str) -> None:
        def run() -> None:
            try:
                work()
            finally:
                self._loop.call_soon_threadsafe(self._thread_ended)

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        self._running += 1  # it ends in this loop, so not before
        self._threads.append(thread)

    def _welcome(self, hello: wire.Hello, stream: Stream) -> None:
        """Who is it? Raises RightsError, and RequestError where there are too many."""
        session = self._service.open(self._tenants.of(hello.token), self._peer)
        self._hello_timer.cancel()
        conversation = StreamConversation(self._service, session, self._send, self._outbox)
        answering = Answering(conversation, self._send, self._turns.release)
        self._talk = _Talk(session, conversation, answering)
        self._send(wire.Welcome(wire.VERSION, f"kvstore {__version__}"))
        self._start(lambda: self._write(stream), "kvstore-data-write")

    def _answer(self, request: wire.Request) -> None:
        over = True
        try:
            over = self._talking().answering.answer(request)
        except WireError as error:
            self._break(error)
        if over:  # or the reader would wait for its turn for ever
            self._turns.release()

    def _break(self, error: KVStoreError) -> None:
        """Say why, and nothing more."""
        log.warning("%s is not heard any more: %s", self._peer, error)
        self._send(failed(0, error))
        self._outbox.finish()

    def _send(self, reply: wire.Reply) -> None:
        if not self._outbox.put(wire.encode(reply)):
            log.warning("%s does not read its replies", self._peer)
            self.close()

    def _thread_ended(self) -> None:
        """Neither works without the other."""
        self.close()
        self._running -= 1
        if self._running:
            return
        self._hello_timer.cancel()
        if self._talk is not None:
            self._talk.conversation.close()
            self._service.end(self._talk.session)
        self._socket.close()
        self.closed.set_result(None)

    def _talking(self) -> _Talk:
        if self._talk is None:
            raise WireError("nobody has said hello")
        return self._talk

    # ---- in the threads

    def _in_loop(self, work: Callable[[], T]) -> T:
        """What `work` returns, or raises, in the loop's thread."""
        done: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return done.result()

    def _read(self) -> None:
        try:
            stream = self._secured()
            frames = FrameReader(stream)
            if self._greet(frames, stream):
                self._converse(frames)
        except (OSError, ValueError) as error:  # ValueError: the socket was closed meanwhile
            log.info("%s is gone: %s", self._peer, error)

    def _secured(self) -> Stream:
        sock = self._socket
        sock.settimeout(HELLO_S)
        if self._tls is None:
            return PlainStream(sock, STALL_S)
        secured = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        self._socket = secured
        secured.do_handshake()
        return TlsStream(secured, STALL_S)

    def _greet(self, frames: FrameReader, stream: Stream) -> bool:
        """Whether the client may come in; it has been told."""
        try:
            hello = understood(frames.frame(HELLO_BYTES))
            self._in_loop(lambda: self._welcome(hello, stream))
            return True
        except KVStoreError as error:
            log.info("%s was refused: %s", self._peer, error)
            stream.send([wire.encode(failed(0, error))])
            return False

    def _converse(self, frames: FrameReader) -> None:
        try:
            while frames.more():
                request = wire.decode_request(frames.frame())
                if isinstance(request, wire.Commit):
                    self._fill(frames, request)
                self._turns.acquire()
                self._loop.call_soon_threadsafe(self._answer, request)
        except KVStoreError as error:
            reason = error
            self._in_loop(lambda: self._break(reason))
            self._threads[-1].join()  # until the client has been told

    def _fill(self, frames: FrameReader, commit: wire.Commit) -> None:
        """The bytes that follow a commit, into their slots."""
        slots = self._in_loop(lambda: self._talking().conversation.slots(commit))
        for run in slots.runs():
            frames.fill(run)

    def _write(self, stream: Stream) -> None:
        with contextlib.suppress(OSError, ValueError):
            while (piece := self._outbox.take()) is not None:
                stream.send(piece.buffers)
                if piece.lease is not None:
                    self._loop.call_soon_threadsafe(self._sent, piece.lease, piece.blocks)

    def _sent(self, lease: int, blocks: int) -> None:
        self._talking().conversation.sent(lease, blocks)

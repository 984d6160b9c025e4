"""A connection that bulk goes through: blocks of bytes straight into and out of memory.

Reads and writes block, without the interpreter's lock, so that a thread for each direction
carries what the network does. One thread may read while another writes.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import threading
from collections.abc import Sequence
from itertools import islice
from typing import Protocol

from kvstore import wire
from kvstore.errors import WireError

Buffer = bytes | bytearray | memoryview

PIECES = 512  # of one system call; the kernel takes 1024
# Bytes of one system call that sends. With hundreds of MiB in one, a third less gets through.
CALL_BYTES = 2 << 20
RECORD_BYTES = 256 << 10  # written at once under TLS, so that a reader's turn comes
AHEAD_BYTES = 64 << 10  # that may be read beyond a frame; what is block bytes is copied once
# A peer that has gone without a word (a power cut, a pulled cable) is noticed after about that.
KEEPALIVE_IDLE_S, KEEPALIVE_EACH_S, KEEPALIVE_TRIES = 15, 5, 3


class Stream(Protocol):
    """Raises OSError where the peer is gone, TimeoutError where it moves nothing for too long."""

    def receive(self, view: memoryview) -> int:
        """Block until there is something, and write it to `view`; 0 at the end."""
        ...

    def fill(self, view: memoryview) -> None:
        """Block until all of `view` is written. Raises ConnectionResetError at the end."""
        ...

    def send(self, pieces: Sequence[Buffer]) -> None:
        """Block until all is with the kernel."""
        ...

    def shutdown(self) -> None:
        """Wake both threads: nothing more is read or written."""
        ...

    def close(self) -> None: ...


class PlainStream:
    """TCP as it is."""

    def __init__(self, sock: socket.socket, stall_s: float) -> None:
        """Owns the socket. `stall_s`: how long nothing may move that should."""
        self._socket = sock
        configure(sock)
        sock.settimeout(None)
        seconds, rest = divmod(stall_s, 1)
        limit = struct.pack("ll", int(seconds), int(rest * 1e6))
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, limit)

    def receive(self, view: memoryview) -> int:
        return self._receive(view, 0)

    def fill(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            got = self._receive(view[done:], socket.MSG_WAITALL)
            if not got:
                raise ConnectionResetError("the other side has closed the connection")
            done += got

    def send(self, pieces: Sequence[Buffer]) -> None:
        left = [memoryview(piece) for piece in pieces]
        first = 0
        while first < len(left):
            try:
                sent = self._socket.sendmsg(_of_one_call(left, first))
            except BlockingIOError:
                raise TimeoutError("the other side reads nothing") from None
            while first < len(left) and sent >= len(left[first]):
                sent -= len(left[first])
                first += 1
            if sent:
                left[first] = left[first][sent:]

    def shutdown(self) -> None:
        shut(self._socket)

    def close(self) -> None:
        self._socket.close()

    def _receive(self, view: memoryview, flags: int) -> int:
        try:
            return self._socket.recv_into(view, 0, flags)
        except BlockingIOError:
            raise TimeoutError("the other side sends nothing") from None


def _of_one_call(pieces: Sequence[memoryview], first: int) -> list[memoryview]:
    """What one call sends of `pieces[first:]`: from the beginning, at least a byte."""
    room, call = CALL_BYTES, []
    for piece in islice(pieces, first, first + PIECES):
        call.append(piece[:room])
        room -= len(call[-1])
        if not room:
            break
    return call


class TlsStream:
    """TLS. OpenSSL wants one thread at a time in a connection, so none waits while inside."""

    def __init__(self, sock: ssl.SSLSocket, stall_s: float) -> None:
        """Owns the socket, whose handshake is done."""
        configure(sock)
        sock.setblocking(False)
        self._socket = sock
        self._stall_s = stall_s
        self._inside = threading.Lock()

    def receive(self, view: memoryview) -> int:
        while True:
            with self._inside:
                try:
                    return self._socket.recv_into(view)
                except ssl.SSLWantReadError:
                    event = select.POLLIN
                except ssl.SSLWantWriteError:
                    event = select.POLLOUT
            self._wait(event)

    def fill(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            got = self.receive(view[done:])
            if not got:
                raise ConnectionResetError("the other side has closed the connection")
            done += got

    def send(self, pieces: Sequence[Buffer]) -> None:
        for piece in pieces:
            view = memoryview(piece)
            while len(view):
                view = view[self._send(view[:RECORD_BYTES]) :]

    def shutdown(self) -> None:
        shut(self._socket)

    def close(self) -> None:
        self._socket.close()

    def _send(self, view: memoryview) -> int:
        while True:
            with self._inside:
                try:
                    return self._socket.send(view)
                except ssl.SSLWantReadError:
                    event = select.POLLIN
                except ssl.SSLWantWriteError:
                    event = select.POLLOUT
            self._wait(event)

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._socket, event)
        if not poll.poll(self._stall_s * 1000):
            raise TimeoutError("nothing moves on the connection")


class FrameReader:
    """Frames and the block bytes between them, as they come. Belongs to one thread."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._buffer = memoryview(bytearray(AHEAD_BYTES))
        self._start = self._stop = 0

    def more(self) -> bool:
        """Wait, for as long as it takes, until something comes; False where the peer has ended."""
        while self._start == self._stop:
            with contextlib.suppress(TimeoutError):  # silent, but maybe only idle
                self._start, self._stop = 0, self._stream.receive(self._buffer)
                if not self._stop:
                    return False
        return True

    def frame(self, longest: int = wire.MAX_FRAME_BYTES) -> bytes:
        """The body of the next frame.

        Raises WireError for what is no frame, or longer than `longest`, and OSError.
        """
        prefix = bytearray(wire.LENGTH_BYTES)
        self.fill(memoryview(prefix))
        body = bytearray(wire.body_bytes(prefix))
        if len(body) > longest:
            raise WireError(f"a frame of {len(body)} bytes where {longest} are allowed")
        self.fill(memoryview(body))
        return bytes(body)

    def fill(self, view: memoryview) -> None:
        """The next bytes: those that are here by a copy, all others straight from the stream."""
        here = min(self._stop - self._start, len(view))
        view[:here] = self._buffer[self._start : self._start + here]
        self._start += here
        rest = view[here:]
        if len(rest) >= AHEAD_BYTES:
            self._stream.fill(rest)
            return
        while len(rest):
            self._start, self._stop = 0, self._stream.receive(self._buffer)
            if not self._stop:
                raise ConnectionResetError("the other side has closed the connection")
            here = min(self._stop, len(rest))
            rest[:here] = self._buffer[:here]
            self._start = here
            rest = rest[here:]

    def skip(self, nbytes: int) -> None:
        """Drop the next bytes."""
        scratch = memoryview(bytearray(min(nbytes, 1 << 20)))
        while nbytes:
            piece = scratch[:nbytes]
            self.fill(piece)
            nbytes -= len(piece)


def configure(sock: socket.socket) -> None:
    """No delay for small frames, and a peer that has vanished is noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_EACH_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_TRIES)


def shut(sock: socket.socket) -> None:
    """The connection is over; a thread that is inside comes out. The descriptor stays."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)

"""A socket that many threads share without a thread of its own: whoever waits reads, for all."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence

from kvstore import wire
from kvstore.client.exchange import Exchange
from kvstore.errors import WireError
from kvstore.stream import Buffer

RECEIVE_BYTES = 256 << 10
LONGEST_POLL_S = 3600.0  # a longer one would not fit into the system call's argument


class Connection(Exchange):
    """Over a Unix socket, which is open until `close`.

    For the daemon takes that, and nothing less, for the end of every lease.
    """

    def __init__(
        self, sock: socket.socket, timeout_s: float, pushed: Callable[[wire.Reply], None]
    ) -> None:
        """Owns the socket, from which `Welcome` was read and nothing more."""
        super().__init__(timeout_s, pushed)
        self._socket = sock
        sock.settimeout(None)  # a timeout of Python's costs a system call more each time
        seconds, rest = divmod(timeout_s, 1)
        sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(rest * 1e6))
        )
        self._waker = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._poll.register(self._waker, select.POLLIN)
        self._is_read = False  # one thread is at it
        self._received = bytearray()

    def wait(self, condition: Callable[[], bool], until_s: float) -> bool:
        """Read until the condition holds; False at the time `until_s`, or once it is lost."""
        with self.turn:
            while not condition():
                left_s = until_s - time.monotonic()
                if self.lost is not None or left_s <= 0:
                    return False
                if self._is_read:
                    self.turn.wait(left_s)
                else:
                    self._read(left_s)
            return True

    def drain(self) -> None:
        """Take in what has arrived, without waiting."""
        with self.turn:
            while self.lost is None and not self._is_read and self._read(0.0):
                pass

    def wake_locked(self) -> None:
        """Have all who wait look at their conditions again."""
        self.turn.notify_all()
        if self._is_read:
            os.eventfd_write(self._waker, 1)

    def close(self) -> None:
        """Tell the daemon that nobody reads its memory any more. May be called twice.

        The socket's number may be another file's right after, so nobody is left at it.
        """
        if self.is_inherited:  # the parent goes on, and its threads have all locks
            self._socket.close()
            return
        self.lose("closed")
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._sending, self.turn:
            while self._is_read:
                self.turn.wait()
            self._give_back()

    def __del__(self) -> None:
        self._give_back()  # nobody has closed it: the last lease and the client were both lost

    def _give_back(self) -> None:
        waker, self._waker = getattr(self, "_waker", -1), -1
        if waker >= 0:
            self._socket.close()
            os.close(waker)

    def _send(self, pieces: Sequence[Buffer]) -> None:
        for piece in pieces:
            self._socket.sendall(piece)

    def _read(self, timeout_s: float) -> bool:
        """One piece of what comes, with `turn` held at both ends but not between."""
        self._is_read = True
        self.turn.release()
        data: bytes | None = None
        why = ""
        try:
            for file, _ in self._poll.poll(min(timeout_s, LONGEST_POLL_S) * 1000):
                if file == self._waker:
                    os.eventfd_read(file)
                else:
                    data = self._socket.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
                    why = "it has closed the connection"
        except (BlockingIOError, InterruptedError):
            pass
        except (OSError, ValueError) as error:
            data, why = b"", f"cannot be heard: {error}"
        finally:  # also on Ctrl-C: others wait for their replies
            self.turn.acquire()
            self._is_read = False
            self.turn.notify_all()
        if data:
            self._take(data)
        elif data is not None:
            self.lose(why)
        return bool(data)

    def _take(self, data: bytes) -> None:
        """Hear all whole messages; none once lost, for what is leased then has no owner."""
        received = self._received
        received += data
        start = 0
        try:
            while self.lost is None and len(received) - start >= wire.LENGTH_BYTES:
                body = start + wire.LENGTH_BYTES
                end = body + wire.body_bytes(received[start:body])
                if len(received) < end:
                    break
                self._hear(wire.decode_reply(received[body:end]))
                start = end
        except WireError as error:
            self.lose(str(error))
        del received[:start]

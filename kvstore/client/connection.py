"""A socket that many threads share without a thread of its own: whoever waits reads, for all."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable

from kvstore import wire
from kvstore.errors import ConnectionLostError, KVStoreError, WireError

RECEIVE_BYTES = 256 << 10
LONGEST_POLL_S = 3600.0  # a longer one would not fit into the system call's argument


class Connection:
    """Requests and their replies, in any order, and what the daemon says unasked.

    `turn` guards all that replies change; conditions and `pushed`, which hears what nobody
    waits for, run with it held. Once lost, a connection stays so. Its socket is open until
    `close`, because the daemon takes that, and nothing less, for the end of every lease.
    """

    def __init__(
        self, sock: socket.socket, timeout_s: float, pushed: Callable[[wire.Reply], None]
    ) -> None:
        """Owns the socket, from which `Welcome` was read and nothing more."""
        self.turn = threading.Condition()
        self._socket = sock
        sock.settimeout(None)  # a timeout of Python's costs a system call more each time
        seconds, rest = divmod(timeout_s, 1)
        sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(rest * 1e6))
        )
        self._timeout_s = timeout_s
        self._pushed = pushed
        self._sending = threading.Lock()
        self._waker = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._poll.register(self._waker, select.POLLIN)
        self._numbers = itertools.count(1)
        self._replies: dict[int, wire.Reply | None] = {}  # of requests whose senders wait
        self._takers: dict[int, Callable[[wire.Reply], None]] = {}  # told before any later message
        self._is_read = False  # one thread is at it
        self._received = bytearray()
        self._pid = os.getpid()
        self.lost: str | None = None  # why

    def next_seq(self) -> int:
        return next(self._numbers)

    def request(
        self, seq: int, message: wire.Request, taker: Callable[[wire.Reply], None] | None = None
    ) -> wire.Reply:
        """Send, and wait for the reply. Raises ConnectionLostError, or what the daemon refused.

        `taker` gets the reply first, with `turn` held, before what was sent after it is heard.
        """
        with self.turn:
            self._replies[seq] = None
            if taker is not None:
                self._takers[seq] = taker
        try:
            self.post(message)
            answered = self.wait(
                lambda: self._replies[seq] is not None, time.monotonic() + self._timeout_s
            )
            if not answered:
                self.lose(f"no answer within {self._timeout_s:g} s")
        finally:
            with self.turn:
                reply = self._replies.pop(seq)
                self._takers.pop(seq, None)
        if reply is None:
            raise ConnectionLostError(f"the daemon is away: {self.lost}")
        if isinstance(reply, wire.Failed):
            raise refusal(reply)
        return reply

    def post(self, message: wire.Request) -> None:
        """Send what has no reply. Raises ConnectionLostError."""
        frame = wire.encode(message)
        with self._sending:
            self._check()
            try:
                self._socket.sendall(frame)
            except BaseException as error:
                # Half a frame may have gone out, also on Ctrl-C; nothing may follow it.
                self.lose(f"cannot be sent to: {error}")
                if not isinstance(error, OSError):
                    raise
                self._check()

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

    def lose(self, why: str) -> None:
        with self.turn:
            if self.lost is None:
                self.lost = why
                self.wake_locked()

    def wake_locked(self) -> None:
        """Have all who wait look at their conditions again."""
        self.turn.notify_all()
        if self._is_read:
            os.eventfd_write(self._waker, 1)

    @property
    def is_inherited(self) -> bool:
        """Whether this process was forked from the one whose connection it is."""
        return os.getpid() != self._pid

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

    def _check(self) -> None:
        if self.is_inherited:
            raise ConnectionLostError("this connection belongs to the parent process")
        if self.lost is not None:
            raise ConnectionLostError(f"the daemon is away: {self.lost}")

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

    def _hear(self, reply: wire.Reply) -> None:
        seq: int = getattr(reply, "seq", 0)
        if isinstance(reply, wire.Failed) and not seq:
            self.lose(reply.message)
        elif seq in self._replies:
            self._replies[seq] = reply
            if taker := self._takers.get(seq):
                taker(reply)
        else:
            self._pushed(reply)


def refusal(failed: wire.Failed) -> KVStoreError:
    """The daemon's refusal as an error of this process."""
    from kvstore import errors

    kind = getattr(errors, failed.kind, None)
    if isinstance(kind, type) and issubclass(kind, KVStoreError):
        return kind(failed.message)
    return KVStoreError(failed.message)

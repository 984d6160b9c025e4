"""Requests and their replies over one connection, whatever carries it."""

from __future__ import annotations

import itertools
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from kvstore import wire
from kvstore.errors import ConnectionLostError, KVStoreError, WireError
from kvstore.stream import Buffer


class Exchange(ABC):
    """Requests and their replies, in any order, and what the daemon says unasked.

    `turn` guards all that replies change; conditions and `pushed`, which hears what nobody
    waits for, run with it held. Once lost, a connection stays so.
    """

    def __init__(self, timeout_s: float, pushed: Callable[[wire.Reply], None]) -> None:
        self.turn = threading.Condition()
        self.lost: str | None = None  # why
        self._timeout_s = timeout_s
        self._pushed = pushed
        self._sending = threading.Lock()
        self._numbers = itertools.count(1)
        self._replies: dict[int, wire.Reply | None] = {}  # of requests whose senders wait
        self._takers: dict[int, Callable[[wire.Reply], None]] = {}  # told before any later message
        self._pid = os.getpid()

    @property
    def is_inherited(self) -> bool:
        """Whether this process was forked from the one whose connection it is."""
        return os.getpid() != self._pid

    def next_seq(self) -> int:
        return next(self._numbers)

    def request(
        self,
        seq: int,
        message: wire.Request,
        taker: Callable[[wire.Reply], None] | None = None,
        payload: Sequence[Buffer] = (),
    ) -> wire.Reply:
        """Send, and wait for the reply. Raises ConnectionLostError, or what the daemon refused.

        `taker` gets the reply first, with `turn` held, before what was sent after it is heard.
        """
        with self.turn:
            self._replies[seq] = None
            if taker is not None:
                self._takers[seq] = taker
        try:
            self.post(message, payload)
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

    def post(self, message: wire.Request, payload: Sequence[Buffer] = ()) -> None:
        """Send what has no reply, and the block bytes it announces. Raises ConnectionLostError."""
        frame = wire.encode(message)
        with self._sending:
            self._check()
            try:
                self._send([frame, *payload])
            except BaseException as error:
                # Half a frame may have gone out, also on Ctrl-C; nothing may follow it.
                self.lose(f"cannot be sent to: {error}")
                if not isinstance(error, OSError):
                    raise
                self._check()

    @abstractmethod
    def wait(self, condition: Callable[[], bool], until_s: float) -> bool:
        """Wait until the condition holds; False at the time `until_s`, or once it is lost."""

    @abstractmethod
    def drain(self) -> None:
        """Take in what has arrived, without waiting."""

    @abstractmethod
    def wake_locked(self) -> None:
        """Have all who wait look at their conditions again."""

    def lose(self, why: str) -> None:
        """Nothing more is said or heard. May be called again."""
        with self.turn:
            if self.lost is None:
                self.lost = why
                self.wake_locked()

    @abstractmethod
    def close(self) -> None:
        """Give everything back. May be called twice."""

    @abstractmethod
    def _send(self, pieces: Sequence[Buffer]) -> None: ...

    def _check(self) -> None:
        if self.is_inherited:
            raise ConnectionLostError("this connection belongs to the parent process")
        if self.lost is not None:
            raise ConnectionLostError(f"the daemon is away: {self.lost}")

    def _hear(self, reply: wire.Reply) -> None:
        """With `turn` held."""
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


def check_welcome(reply: wire.Reply) -> wire.Welcome:
    """What answers a hello. Raises WireError, or the daemon's refusal."""
    if isinstance(reply, wire.Failed):
        raise refusal(reply)
    if not isinstance(reply, wire.Welcome) or reply.version != wire.VERSION:
        raise WireError("what listens there is no kvstore daemon of this version")
    return reply

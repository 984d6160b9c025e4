"""Requests of one client, answered at once or when they are done."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial

from kvstore import wire
from kvstore.daemon.conversation import Conversation, failed
from kvstore.errors import KVStoreError, RequestError, WireError

log = logging.getLogger(__name__)


class Answering:
    """Belongs to the event loop's thread. A request that is refused does not end anything."""

    def __init__(
        self,
        conversation: Conversation,
        send: Callable[[wire.Reply], None],
        done: Callable[[], None],
    ) -> None:
        """`done` is called whenever a request has been done with that took time."""
        self._conversation = conversation
        self._send = send
        self._done = done
        self._unanswered: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """Requests that are being answered."""
        return len(self._unanswered)

    def answer(self, request: wire.Request) -> bool:
        """Whether that was all; otherwise `done` will be called.

        Raises WireError for what ends the conversation.
        """
        seq: int = getattr(request, "seq", 0)
        answer: wire.Reply | Awaitable[wire.Reply | None] | None
        try:
            answer = self._conversation.answer(request)
        except WireError:
            raise
        except Exception as error:
            answer = _refused(seq, error)
        if isinstance(answer, Awaitable):
            task = asyncio.get_running_loop().create_task(self._finish(seq, answer))
            self._unanswered.add(task)
            task.add_done_callback(partial(self._finished, answer))
            return False
        self._say(seq, answer)
        return True

    def close(self) -> None:
        """Nobody waits for answers any more."""
        for task in self._unanswered:
            task.cancel()

    async def _finish(self, seq: int, answer: Awaitable[wire.Reply | None]) -> None:
        try:
            reply = await answer
        except Exception as error:
            reply = _refused(seq, error)
        self._say(seq, reply)

    def _say(self, seq: int, reply: wire.Reply | None) -> None:
        if reply is None:
            return
        try:
            self._send(reply)
        except WireError as error:  # longer than a frame may be: no fault of the client's
            self._send(_refused(seq, RequestError(str(error))))

    def _finished(self, answer: Awaitable[wire.Reply | None], task: asyncio.Task[None]) -> None:
        self._unanswered.discard(task)
        if isinstance(answer, Coroutine):  # which was never begun, where the client left at once
            answer.close()
        self._done()


def _refused(seq: int, error: Exception) -> wire.Failed:
    """A fault of ours costs one answer; raised, it would end the connection under the leases."""
    if not isinstance(error, KVStoreError):
        log.error("a request failed", exc_info=error)
    return failed(seq, error)

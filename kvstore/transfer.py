"""Calling a lower tier without depending on its answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from kvstore.breaker import Breaker
from kvstore.clock import Clock
from kvstore.errors import TierError
from kvstore.tier import Tier

log = logging.getLogger(__name__)

T = TypeVar("T")


class Transfers:
    """Calls of one tier; a call that is not answered in time is given up.

    A call that was given up still goes on, for nothing stops a thread that waits
    for a drive: the tier may read or write its buffers until it ends. What the
    call uses is therefore given back in `landed`, which is called once, however
    late. Until then the breaker lets no other call through, so no more can hang
    than were being made at once. Only `allows` may be used from any thread; all
    else belongs to the background loop.
    """

    def __init__(self, tier: Tier, clock: Clock, deadline_s: float) -> None:
        self._tier = tier
        self._clock = clock
        self._deadline_s = deadline_s
        self._breaker = Breaker()
        self._late: set[asyncio.Task[Any]] = set()

    def allows(self) -> bool:
        """Whether the tier is worth asking: not while it keeps failing, or does not answer."""
        return self._breaker.allows(self._clock.monotonic_s())

    @property
    def unanswered(self) -> int:
        """Calls that were given up and have not ended since."""
        return self._breaker.unanswered

    async def run(
        self, call: Callable[[], Coroutine[Any, Any, T]], landed: Callable[[T | None], None]
    ) -> bool:
        """Call the tier; False if the call was given up.

        `landed` gets the result, or None where the tier failed as a whole or is
        not to be asked: by the time this returns True, or later if False.
        """
        if not self._breaker.begin(self._clock.monotonic_s()):
            landed(None)
            return True
        task = asyncio.ensure_future(call())
        await asyncio.wait([task], timeout=self._deadline_s)
        if task.done():
            landed(self._result(task))
            return True
        log.warning("%s: no answer within %g s; going on without", self._name, self._deadline_s)
        self._breaker.gave_up(self._clock.monotonic_s())
        self._late.add(task)

        def answered(task: asyncio.Task[T]) -> None:
            self._late.discard(task)
            self._breaker.answered()
            landed(self._result(task))

        task.add_done_callback(answered)
        return False

    async def settled(self) -> None:
        """Wait until every call that was given up has ended."""
        while self._late:
            await asyncio.wait(self._late)

    @property
    def _name(self) -> str:
        return self._tier.name

    def _result(self, task: asyncio.Task[T]) -> T | None:
        error = TierError("cancelled") if task.cancelled() else task.exception()
        if error is None:
            self._breaker.succeeded()
            return task.result()
        # A tier that fails as a whole costs hits, never a request.
        # Its text: a log that keeps an error keeps its frames, and their buffers.
        log.warning("%s: %s: %s", self._name, type(error).__name__, str(error))
        self._breaker.failed(self._clock.monotonic_s())
        return None

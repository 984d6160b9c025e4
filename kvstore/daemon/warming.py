"""Arena that was never touched is made memory behind everyone's back."""

from __future__ import annotations

import asyncio

from kvstore.tier import SharedArena

STEP_BYTES = 64 << 20  # a tenth of a second, where the machine has little memory at hand


class Warming:
    """Makes memory up to where slots have been given out. Belongs to the event loop's thread.

    Nobody waits for it, for it may take seconds: who writes to a slot before gets its pages
    one by one, and more slowly, from the kernel.
    """

    def __init__(self, arena: SharedArena) -> None:
        self._arena = arena
        self._wanted_bytes = 0
        self._working: asyncio.Task[None] | None = None

    def want(self, stop: int) -> None:
        """`[0, stop)` of the arena is about to be written."""
        if stop <= self._wanted_bytes:
            return
        self._wanted_bytes = stop
        if self._working is None and not self._arena.is_populated(stop):
            self._working = asyncio.get_running_loop().create_task(self._work())

    def close(self) -> None:
        """Stop at the next step."""
        if self._working is not None:
            self._working.cancel()

    async def _work(self) -> None:
        stop = 0
        while not self._arena.is_populated(self._wanted_bytes):
            stop = min(stop + STEP_BYTES, self._wanted_bytes)
            if not self._arena.is_populated(stop):
                await asyncio.to_thread(self._arena.populate, stop)
        self._working = None

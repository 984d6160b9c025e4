"""How a store ends: what is only in RAM goes below, then everything is given back."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import NamedTuple

from kvstore.background import BackgroundLoop
from kvstore.below import Below
from kvstore.hub import Hub

log = logging.getLogger(__name__)


class Ended(NamedTuple):
    """What became, when a store was closed, of blocks that were in RAM only."""

    written_blocks: int
    dropped_blocks: int


class Ending:
    """Waits for the lower tier, as far as it answers. Lock not held."""

    def __init__(self, hub: Hub, below: Below | None, loop: BackgroundLoop) -> None:
        self._hub = hub
        self._below = below
        self._loop = loop
        self.ended: Ended | None = None  # None until `close` has written what it could

    def flush(self, timeout_s: float | None) -> bool:
        """See `BlockStore.flush`."""
        hub, below = self._hub, self._below
        if below is None:
            return True
        until_s = None if timeout_s is None else hub.clock.monotonic_s() + timeout_s
        with hub.lock:
            keys = list(hub.slots.index.rows_by_key)
        waiting = [key for key, there in zip(keys, below.tier.peek(keys), strict=True) if not there]
        with hub.lock:
            while True:
                while waiting and (room := below.demotions.room_locked()):
                    rows = hub.slots.find(waiting[:room])
                    below.demotions.offer_locked([row for row in rows if row is not None])
                    del waiting[:room]
                if not waiting and below.idle:
                    return True
                left_s = None if until_s is None else until_s - hub.clock.monotonic_s()
                if left_s is not None and left_s <= 0:
                    return False
                hub.changed.wait(None if left_s is None else min(left_s, threading.TIMEOUT_MAX))

    def close(self, timeout_s: float | None) -> None:
        """Write for `timeout_s`, and give everything back. The store answers no more."""
        counters = self._hub.counters
        before = counters["demoted_blocks"]
        try:
            if not self.flush(timeout_s):
                self._stop_writing()
            self.ended = Ended(counters["demoted_blocks"] - before, self._in_ram_only())
        finally:
            self._give_back()

    def _stop_writing(self) -> None:
        """Drop what has yet to be written, and wait for what is being written."""
        below = self._below
        assert below is not None
        with self._hub.lock:
            dropped = below.demotions.drop_queue_locked()
            log.warning("closed before %d blocks were written to %s", dropped, below.tier.name)
            self._hub.changed.wait_for(lambda: below.idle)

    def _in_ram_only(self) -> int:
        with self._hub.lock:
            keys = list(self._hub.slots.index.rows_by_key)
        if self._below is None:
            return len(keys)
        return self._below.tier.peek(keys).count(False)

    def _give_back(self) -> None:
        ended, below = self._loop.spawn(self._end()), self._below
        if below is not None and below.transfers.unanswered:
            log.warning("closed without an answer from %s to earlier calls", below.tier.name)
            ended.add_done_callback(lambda _: self._loop.stop())
            return
        try:
            ended.result()
        finally:
            self._loop.stop()

    async def _end(self) -> None:
        """Close the tiers once they are done with each other's memory."""
        async with contextlib.AsyncExitStack() as ending:
            ending.push_async_callback(self._hub.ram.close)
            ending.callback(self._hub.release_views)
            if self._below is not None:
                ending.push_async_callback(self._below.tier.close)
                await self._below.transfers.settled()

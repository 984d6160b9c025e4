"""Reading a store's events in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from kvstore.events import Numbered
from kvstore.feed import Feed

BATCH_BLOCKS = 1024  # read at once; an event is never cut, so it may be more


class Following:
    """The readers of a feed in one event loop. One call wakes them all: it is made under locks."""

    def __init__(self, feed: Feed) -> None:
        """The feed is borrowed. Belongs to the running loop."""
        self._feed = feed
        self._loop = asyncio.get_running_loop()
        self._readers: set[asyncio.Event] = set()  # each set when there is news
        self._unsubscribe: Callable[[], None] = lambda: None
        self._called = False

    async def read(self, after_id: int) -> AsyncGenerator[list[Numbered], None]:
        """Events after number `after_id`, in batches as they come, until the feed has closed.

        Nothing is queued here: who asks too seldom gets FallenBehindError. Close the generator.
        """
        news = asyncio.Event()
        if not self._readers:
            self._unsubscribe = self._feed.subscribe(self._wake)
        self._readers.add(news)
        try:
            while True:
                news.clear()
                is_last = self._feed.closed  # before reading: it may end meanwhile, with an event
                events = self._feed.read(after_id, BATCH_BLOCKS)
                if events:
                    after_id = events[-1][0]
                    yield events
                elif is_last:
                    return
                else:
                    await news.wait()
        finally:
            self._readers.discard(news)
            if not self._readers:
                self._unsubscribe()

    def _wake(self) -> None:
        """From any thread: once for all that happens until we look."""
        if not self._called:
            self._called = True
            self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._called = False
        for news in self._readers:
            news.set()

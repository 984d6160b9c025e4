"""Reading a store's events in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from kvstore.events import Numbered
from kvstore.feed import Feed

BATCH_BLOCKS = 1024  # read at once; an event is never cut, so it may be more


async def follow(feed: Feed, after_id: int) -> AsyncGenerator[list[Numbered], None]:
    """Events after number `after_id`, in batches as they come, until the feed has closed.

    Nothing is queued here: who asks too seldom gets FallenBehindError. Close the generator.
    """
    loop, news = asyncio.get_running_loop(), asyncio.Event()
    called = False

    def wake() -> None:
        """From any thread, with the store's locks held: once for all that happens until we look."""
        nonlocal called
        if not called:
            called = True
            loop.call_soon_threadsafe(look)

    def look() -> None:
        nonlocal called
        called = False
        news.set()

    unsubscribe = feed.subscribe(wake)
    try:
        while True:
            news.clear()
            events = feed.read(after_id, BATCH_BLOCKS)
            if events:
                after_id = events[-1][0]
                yield events
            elif feed.closed:
                return
            else:
                await news.wait()
    finally:
        unsubscribe()

"""The one background thread on which bytes move, and its event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class BackgroundLoop:
    """An asyncio loop in a daemon thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def spawn(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start `work` from any thread; its future is done when it is. What it raises is logged."""
        return asyncio.run_coroutine_threadsafe(_logged(work), self._loop)

    def stop(self) -> None:
        """Stop the loop, and wait for its thread unless this is it.

        Nothing may be running on it any more.
        """
        self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join()


async def _logged(work: Coroutine[Any, Any, T]) -> T:
    try:
        return await work
    except Exception:
        log.exception("a background task of the store failed")
        raise

"""What the store raises is counted, and goes no further."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


class Guard:
    """Keeps what moves blocks between engine and store from ever failing a request.

    `counters` are those of all that it guards.
    """

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()

    @contextmanager
    def __call__(self, action: str) -> Iterator[None]:
        """Count what is raised inside, and go on without it."""
        try:
            yield
        except Exception as error:
            self.counters["store_errors"] += 1
            level = logging.WARNING if self.counters["store_errors"] == 1 else logging.DEBUG
            # Its text: a log that keeps an error keeps its frames, and their buffers.
            text = repr(error)
            log.log(level, "the store failed (%s), going on without it: %s", action, text)

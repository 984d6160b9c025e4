"""What the store raises is counted, and goes no further."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from kvstore.errors import RightsError

log = logging.getLogger(__name__)


class Guard:
    """Keeps what moves blocks between engine and store from ever failing a request.

    `counters` are those of all that it guards. What the store does not allow stands in
    `denied`, and need not be tried again.
    """

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.denied: set[str] = set()

    @contextmanager
    def __call__(self, action: str) -> Iterator[None]:
        """Count what is raised inside, and go on without it."""
        try:
            yield
        except RightsError as error:
            if action not in self.denied:
                log.warning("the store does not allow it (%s), going on without: %s", action, error)
            self.denied.add(action)
        except Exception as error:
            self.counters["store_errors"] += 1
            level = logging.WARNING if self.counters["store_errors"] == 1 else logging.DEBUG
            # Its text: a log that keeps an error keeps its frames, and their buffers.
            text = repr(error)
            log.log(level, "the store failed (%s), going on without it: %s", action, text)

"""What the store raises is counted, and goes no further."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from kvstore.errors import RightsError

log = logging.getLogger(__name__)

DENIED_S = 60.0  # a daemon may have been started again, and allow more


class Guard:
    """Keeps what moves blocks between engine and store from ever failing a request.

    `counters` are those of all that it guards.
    """

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self._denied_s: dict[str, float] = {}  # until when an action need not be tried again

    def is_denied(self, action: str) -> bool:
        """Whether the store has not allowed it, lately."""
        return time.monotonic() < self._denied_s.get(action, 0.0)

    @contextmanager
    def __call__(self, action: str) -> Iterator[None]:
        """Count what is raised inside, and go on without it."""
        try:
            yield
        except RightsError as error:
            self.counters["store_denials"] += 1
            if action not in self._denied_s:
                log.warning("the store does not allow it (%s), going on without: %s", action, error)
            self._denied_s[action] = time.monotonic() + DENIED_S
        except Exception as error:
            self.counters["store_errors"] += 1
            level = logging.WARNING if self.counters["store_errors"] == 1 else logging.DEBUG
            # Its text: a log that keeps an error keeps its frames, and their buffers.
            text = repr(error)
            log.log(level, "the store failed (%s), going on without it: %s", action, text)

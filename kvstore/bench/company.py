"""Work that goes on and on, on a stream of its own, beside what is measured."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol


class End(Protocol):
    """Of something that a device was told to do: torch.cuda.Event."""

    def query(self) -> bool:
        """Whether it is over."""
        ...


class Repeated:
    """What `start` starts, again and again: at most `ahead` of them are not over.

    Not all that will be needed is started at once. A stream takes some 1,024 operations, and
    then the host waits, so that a second stream would get nothing until the first is nearly done.
    """

    def __init__(self, start: Callable[[], End], ahead: int) -> None:
        self._start = start
        self._ahead = ahead
        self._ends: deque[End] = deque()
        self._paused = False

    def go_on(self) -> None:
        """Start it once more, unless enough of them are under way."""
        while self._ends and self._ends[0].query():
            self._ends.popleft()
            self._paused |= not self._ends
        if len(self._ends) < self._ahead:
            self._ends.append(self._start())

    @property
    def never_paused(self) -> bool:
        """Whether there was always one that was not over, from the first one until now."""
        return not self._paused and bool(self._ends) and not self._ends[-1].query()

"""Time, as something that a test can hold in its hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two readings, both in seconds."""

    def wall_s(self) -> float:
        """Since the epoch: for what is written down and read after a restart."""
        ...

    def monotonic_s(self) -> float:
        """Never goes back: for deadlines and durations."""
        ...


class SystemClock:
    """The machine's clocks."""

    def wall_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()

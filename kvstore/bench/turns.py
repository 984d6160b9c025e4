"""How everything is measured: contenders take turns, the first round does not count, medians.

Turns (A B A B, not A A B B) because a shared machine drifts by more than what
is being compared; the first round faults pages in, compiles, and fills caches; a median
because the rest is noise with a long tail.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Turn = Callable[[], float]  # does the work once; returns the seconds that count


def rounds(turns: Mapping[str, Turn], count: int) -> dict[str, list[float]]:
    """Seconds of each contender's `count` turns, taken alternately, after one that is dropped."""
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(count + 1):
        for name, turn in turns.items():
            seconds = turn()
            if number:
                taken[name].append(seconds)
    return taken


def medians(turns: Mapping[str, Turn], count: int) -> dict[str, float]:
    """Median seconds of each contender."""
    return {name: statistics.median(taken) for name, taken in rounds(turns, count).items()}


def rates(turns: Mapping[str, Turn], count: int, total_bytes: int) -> dict[str, float]:
    """GB/s (10**9 bytes) of each contender, from its median."""
    return {name: total_bytes / s / 1e9 for name, s in medians(turns, count).items()}


def timed(work: Callable[[], object]) -> Turn:
    """A turn of which everything counts."""

    def turn() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return turn

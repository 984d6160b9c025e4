"""How often a value fell between which bounds: latencies and ages, in constant memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MINUTE_S, HOUR_S, DAY_S = 60.0, 3_600.0, 86_400.0

LATENCY_BOUNDS_S = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
)
AGE_BOUNDS_S = (
    *(1.0, 10.0, MINUTE_S, 5 * MINUTE_S, 15 * MINUTE_S),
    *(HOUR_S, 4 * HOUR_S, DAY_S, 3 * DAY_S, 7 * DAY_S, 30 * DAY_S),
)


class Distribution(NamedTuple):
    """What a histogram had counted at one moment.

    `counts[i]` values were at most `bounds[i]` and more than the bound before it;
    the last of `counts` were above all bounds.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float  # the sum of all values

    @property
    def observed(self) -> int:
        """How many values."""
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """What `share` (above 0, up to 1) of all values do not exceed; None where there are none.

        As if values lay evenly between two bounds; those beyond the last bound as if on it.
        """
        left = share * self.observed
        if not left:
            return None
        for i, (bound, counted) in enumerate(zip(self.bounds, self.counts, strict=False)):
            if counted and left <= counted:
                below = self.bounds[i - 1] if i else 0.0
                return below + (bound - below) * left / counted
            left -= counted
        return self.bounds[-1]


class Histogram:
    """Counts values by upper bound. Not thread-safe: the owner locks."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` rise."""
        self._bounds = tuple(bounds)
        self._array = np.array(bounds, dtype=np.float64)
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """`count` times the same value; one below zero, from a clock set back, counts as zero."""
        value = max(0.0, value)
        self._counts[bisect_left(self._bounds, value)] += count
        self._total += value * count

    def add_all(self, values: NDArray[np.float64]) -> None:
        """Each of these values once."""
        values = np.maximum(values, 0.0)
        places = np.searchsorted(self._array, values)
        for place, count in enumerate(np.bincount(places).tolist()):
            self._counts[place] += count
        self._total += float(values.sum())

    def read(self) -> Distribution:
        return Distribution(self._bounds, tuple(self._counts), self._total)

"""The last ten minutes of a few counters, for those who look in and want to see a curve."""

from __future__ import annotations

from collections import deque

from kvstore.answers import NVME, RAM, Stats

STEP_S = 5.0
STEPS = 120

FLOWS = ("served_bytes", "committed_bytes", "promoted_bytes", "demoted_bytes")
COLUMNS = (RAM, NVME, "miss", *FLOWS)


def counters(stats: Stats) -> dict[str, int]:
    """Counters of the history, by the names in `COLUMNS`."""
    blocks = {tier: stats.hits.get(tier, 0) for tier in (RAM, NVME)}
    flows = {name: stats.counters.get(name, 0) for name in FLOWS}
    return {**blocks, "miss": sum(stats.misses.values()), **flows}


class History:
    """What each counter rose by in each of the last `STEPS` steps of `STEP_S`."""

    def __init__(self, stats: Stats) -> None:
        """Begins with what is so now."""
        self._last = counters(stats)
        self._rises: deque[dict[str, int]] = deque(maxlen=STEPS)

    def step(self, stats: Stats) -> None:
        """Another step is over."""
        self._rises.append(self.rise(stats))
        self._last = counters(stats)

    def rise(self, stats: Stats) -> dict[str, int]:
        """Since the last step."""
        now = counters(stats)
        return {name: now[name] - self._last[name] for name in COLUMNS}

    def columns(self, stats: Stats) -> dict[str, list[int]]:
        """For each counter its rises, oldest first; the last is of the step that is not over."""
        rises = [*self._rises, self.rise(stats)]
        return {name: [rise[name] for rise in rises] for name in COLUMNS}

"""Which prefixes are served most, lately: the heavy hitters of a stream, in constant memory.

Space-saving (Metwally, Agrawal and El Abbadi, 2005): as many counters as one can afford; a
newcomer takes over the least of them, and its count. Whoever has more than one part in
`capacity` of all is certainly among them.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

from kvstore.hashing import Key

CAPACITY = 256


class Prefix(NamedTuple):
    """Where chains begin: all that share a first block, such as one system prompt."""

    tenant: str
    namespace: bytes  # fingerprint
    key: Key  # of the first block asked for


class HotPrefix(NamedTuple):
    """`share` of all that was served lately, 0 to 1; `longest_blocks` of any one lease."""

    prefix: Prefix
    share: float
    longest_blocks: int


class HotPrefixes:
    """Counts blocks served, by prefix. Not thread-safe."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._served: dict[Prefix, float] = {}
        self._longest: dict[Prefix, int] = {}
        self._total = 0.0
        # Counts only grow between two fadings: what stands here is a count of some time ago,
        # never too high.
        self._least: list[tuple[float, Prefix]] = []

    def add(self, prefix: Prefix, blocks: int) -> None:
        """A lease over `blocks` blocks (more than none) from there has ended."""
        self._total += blocks
        served = self._served
        if prefix not in served:
            served[prefix] = self._take_over() if len(served) >= self._capacity else 0.0
            heapq.heappush(self._least, (served[prefix], prefix))
        served[prefix] += blocks
        self._longest[prefix] = max(blocks, self._longest.get(prefix, 0))

    def fade(self, factor: float) -> None:
        """Let what was served until now count `factor` (0 to 1) times as much as what will be."""
        self._total *= factor
        self._served = {prefix: count * factor for prefix, count in self._served.items()}
        self._least = [(count, prefix) for prefix, count in self._served.items()]
        heapq.heapify(self._least)

    def top(self, count: int) -> list[HotPrefix]:
        """The `count` most served, most first."""
        served = self._served
        return [
            HotPrefix(prefix, min(1.0, served[prefix] / self._total), self._longest[prefix])
            for prefix in heapq.nlargest(count, served, key=served.__getitem__)
            if self._total
        ]

    def _take_over(self) -> float:
        """Drop the least; returns its count."""
        served = self._served
        count, prefix = self._least[0]
        while count != served[prefix]:
            heapq.heapreplace(self._least, (served[prefix], prefix))
            count, prefix = self._least[0]
        heapq.heappop(self._least)
        del self._longest[prefix]
        return served.pop(prefix)

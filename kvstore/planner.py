"""Load or recompute: how many leading blocks are worth fetching, and which to compute meanwhile.

A plan is a value; carrying it out is the store's and the engine's work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DECAY = 0.9  # weight of the past at each new observation: about the last ten count
DEADLINE_SLACK = 1.5  # how much longer than recomputing a load may take before it is given up
MIN_DEADLINE_S = 0.05  # below this, a deadline measures the scheduler and not the tier
# Computing what could be loaded has to save this share of the time to first token, or it is not
# worth the work.
MEETING_SAVES = 0.1


class LinearCost:
    """`seconds ~ a*x + b*y`, fitted to recent observations by decayed least squares.

    For a tier, x is the number of reads (1) and y the bytes: latency and
    bandwidth. For prefill, x is tokens and y tokens times their mean position:
    the dense layers and attention, which grows with the context.
    """

    def __init__(self) -> None:
        self._xx = self._xy = self._yy = self._xs = self._ys = 0.0
        self.observations = 0

    @classmethod
    def of(cls, a: float, b: float, observations: int) -> LinearCost:
        """One that was measured elsewhere."""
        cost = cls()
        cost._xx = cost._yy = 1.0
        cost._xs, cost._ys = a, b
        cost.observations = observations
        return cost

    def observe(self, x: float, y: float, seconds: float) -> None:
        self._xx = self._xx * DECAY + x * x
        self._xy = self._xy * DECAY + x * y
        self._yy = self._yy * DECAY + y * y
        self._xs = self._xs * DECAY + x * seconds
        self._ys = self._ys * DECAY + y * seconds
        self.observations += 1

    def coefficients(self) -> tuple[float, float]:
        """`(a, b)`, neither below zero."""
        determinant = self._xx * self._yy - self._xy * self._xy
        if determinant > 1e-9 * self._xx * self._yy:
            a = (self._xs * self._yy - self._ys * self._xy) / determinant
            b = (self._ys * self._xx - self._xs * self._xy) / determinant
            if a >= 0 and b >= 0:
                return a, b
        # All observations alike, or noise beyond a sensible fit: the better single term.
        a = self._xs / self._xx if self._xx else 0.0
        b = self._ys / self._yy if self._yy else 0.0
        by_y = self._yy and (not self._xx or self._ys**2 / self._yy >= self._xs**2 / self._xx)
        return (0.0, b) if by_y else (a, 0.0)

    def seconds(self, x: float, y: float) -> float | None:
        """The expected cost, or None before the first observation."""
        if not self.observations:
            return None
        a, b = self.coefficients()
        return a * x + b * y


def prefill_seconds(cost: LinearCost, start: int, stop: int) -> float | None:
    """Expected time to compute tokens `[start, stop)` of a prompt."""
    tokens = stop - start
    return cost.seconds(tokens, tokens * (start + stop) / 2)


class Meeting(NamedTuple):
    """Load all blocks but those of `computed`, and compute these meanwhile.

    Give up on what is loaded after `deadline_s`.
    """

    computed: range
    deadline_s: float


class Plan(NamedTuple):
    """Load `blocks` leading blocks; give up on them after `deadline_s` (None: no bound known).

    `meeting` is there where it would be clearly quicker. It is for an engine that can do both at
    once, and has nothing else to compute.
    """

    blocks: int
    deadline_s: float | None
    meeting: Meeting | None = None


def plan_load(
    sources: Sequence[str],
    block_bytes: int,
    block_tokens: int,
    start_token: int,
    prompt_tokens: int,
    load: Mapping[str, LinearCost],
    prefill: LinearCost,
    queued_bytes: Mapping[str, int],
) -> Plan:
    """How many of the blocks that follow `start_token` to load, for the least time to first token.

    `sources[i]` is the tier of the i-th block; `queued_bytes` what each tier has
    still to read for others. A tier or a prefill speed not yet measured is
    given the benefit of the doubt: loading is tried once, and then known.
    """
    if not sources:
        return Plan(0, None)
    whole = prefill_seconds(prefill, start_token, prompt_tokens)
    if whole is None or any(not load[tier].observations for tier in set(sources) if tier in load):
        return Plan(len(sources), None if whole is None else _deadline(whole))
    loading = _loading_s(sources, block_bytes, load, queued_bytes)
    starts = start_token + np.arange(len(sources) + 1) * block_tokens
    left = np.maximum(prompt_tokens - starts, 0)
    per_token_s, per_position_s = prefill.coefficients()
    # After the first i blocks.
    computing = left * per_token_s + left * (starts + prompt_tokens) / 2 * per_position_s
    total = loading + computing
    best = int(len(total) - 1 - np.argmin(total[::-1]))  # of equals, the one that loads most
    free = next((i for i, source in enumerate(sources) if source in load), len(sources))
    # The first `free` blocks cost nothing. From there to block i it is computed, and from i loaded.
    loading_after = _loading_s(sources[::-1], block_bytes, load, queued_bytes)[::-1]
    both = np.maximum(computing[free] - computing, loading_after)[free:] + computing[-1]
    met = free + int(np.argmin(both))
    meeting = None
    if free < met < len(sources) and both[met - free] < (1 - MEETING_SAVES) * total[best]:
        meeting = Meeting(range(free, met), _deadline(float(computing[0] - computing[-1])))
    if best == 0:
        return Plan(0, None, meeting)
    return Plan(best, _deadline(float(computing[0] - computing[best])), meeting)


def _loading_s(
    sources: Sequence[str],
    block_bytes: int,
    load: Mapping[str, LinearCost],
    queued_bytes: Mapping[str, int],
) -> NDArray[np.float64]:
    """Seconds to load the first i blocks, for i from 0 to all of them."""
    loading = np.zeros(len(sources) + 1)
    for tier in set(sources):
        if tier not in load:
            continue
        latency_s, s_per_byte = load[tier].coefficients()
        blocks = np.concatenate([[0], np.cumsum([source == tier for source in sources])])
        waiting = queued_bytes.get(tier, 0) * s_per_byte
        loading += np.where(blocks > 0, latency_s + waiting, 0.0)
        loading += blocks * block_bytes * s_per_byte
    return loading


def _deadline(recompute_s: float) -> float:
    return max(MIN_DEADLINE_S, DEADLINE_SLACK * recompute_s)

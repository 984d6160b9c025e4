"""How long vLLM takes to compute a prompt: what a load is weighed against."""

from __future__ import annotations

import time

from kvstore.planner import DEADLINE_SLACK, MIN_DEADLINE_S, LinearCost, prefill_seconds

LEAST_TOKENS = 64  # of a step that is measured: below, it is not the tokens that take the time


class PrefillClock:
    """Times steps that compute a part of one prompt and nothing else, one at a time.

    Steps have numbers, because not every step is heard of when it ends.
    """

    def __init__(self) -> None:
        self.cost = LinearCost()
        self._begun = 0
        self._ended = 0
        self._timed: tuple[int, float, float] | None = None

    def step_begins(self, requests: int, tokens: int, position: int) -> int:
        """Of `requests` requests, `tokens` tokens; where there is but one, after `position`.

        Returns the step's number, from 1 on.
        """
        is_alone = self._ended == self._begun
        self._begun += 1
        self._timed = None
        if requests == 1 and tokens >= LEAST_TOKENS and is_alone:
            self._timed = (tokens, tokens * (position + tokens / 2), time.monotonic())
        return self._begun

    def step_has_ended(self, step: int) -> None:
        self._ended = step
        if self._timed is not None and step == self._begun:
            tokens, product, start_s = self._timed
            self.cost.observe(tokens, product, time.monotonic() - start_s)
            self._timed = None


def patience_s(cost: LinearCost, start: int, stop: int) -> float | None:
    """How long to wait for tokens `[start, stop)` rather than compute them; None: not known."""
    seconds = prefill_seconds(cost, start, stop)
    return None if seconds is None else max(MIN_DEADLINE_S, DEADLINE_SLACK * seconds)

"""How long vLLM takes to compute a prompt: what a load is weighed against."""

from __future__ import annotations

import time

from kvstore.planner import LinearCost

LEAST_TOKENS = 64  # of a step that is measured: below, it is not the tokens that take the time


class PrefillClock:
    """Times steps that compute a part of one prompt and nothing else, one at a time."""

    def __init__(self) -> None:
        self.cost = LinearCost()
        self._under_way = 0  # steps
        self._timed: tuple[int, float, float] | None = None

    def step_begins(self, requests: int, tokens: int, position: int) -> None:
        """Of `requests` requests, `tokens` tokens; where there is but one, after `position`."""
        self._timed = None
        if requests == 1 and tokens >= LEAST_TOKENS and not self._under_way:
            self._timed = (tokens, tokens * (position + tokens / 2), time.monotonic())
        self._under_way += 1

    def step_has_ended(self) -> None:
        self._under_way -= 1
        if self._timed is not None:
            tokens, product, start_s = self._timed
            self.cost.observe(tokens, product, time.monotonic() - start_s)
            self._timed = None

"""What a request may ask of its output. Without torch, so that the command line can read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.errors import RequestError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What one request asks of its output. Wrong values raise RequestError.

    `temperature` 0 is greedy: the most likely token, always. Otherwise the
    logits are divided by it and cut in this order: `top_k` (0: off), `top_p`,
    `min_p` (a token must be at least that fraction as likely as the likeliest).
    `repetition_penalty` looks at prompt and output, the other two at the output
    only. With a `seed`, the same request gives the same tokens whatever runs
    beside it; sibling i of `n` draws from `seed + i`. `max_tokens` None means
    until the context is full. `stop` strings end the text before themselves.
    """

    max_tokens: int | None = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        # One string is a sequence of its letters, which is never what was meant.
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        finite = all(
            math.isfinite(value)
            for value in (
                self.temperature,
                self.top_p,
                self.min_p,
                self.repetition_penalty,
                self.presence_penalty,
                self.frequency_penalty,
            )
        )
        demands = {
            "every number must be finite": finite,
            "max_tokens must be at least 1": self.max_tokens is None or self.max_tokens >= 1,
            "temperature must not be negative": self.temperature >= 0,
            "top_k must not be negative (0 turns it off)": self.top_k >= 0,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "min_p must be within 0 and 1": 0 <= self.min_p <= 1,
            "repetition_penalty must be above 0": self.repetition_penalty > 0,
            "presence_penalty must be within -2 and 2": -2 <= self.presence_penalty <= 2,
            "frequency_penalty must be within -2 and 2": -2 <= self.frequency_penalty <= 2,
            "seed must be within 0 and 2**63 - 1": self.seed is None or 0 <= self.seed < 2**63,
            "stop strings must not be empty": all(self.stop),
            "n must be at least 1": self.n >= 1,
        }
        for demand, holds in demands.items():
            if not holds:
                raise RequestError(f"sampling: {demand}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

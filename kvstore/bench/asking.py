"""Prompts that nobody has seen, and what the engine makes of them."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from kvstore.engine.engine import Engine
from kvstore.engine.output import Usage
from kvstore.engine.sampling import SamplingParams

_seeds = iter(range(1 << 62))


def fresh_tokens(vocabulary: int, count: int) -> list[int]:
    """`count` random tokens; no two calls in a process give the same."""
    return random.Random(next(_seeds)).choices(range(vocabulary), k=count)


def answer_of(tokens: int) -> SamplingParams:
    """An answer of exactly so many tokens, the likeliest each time."""
    return SamplingParams(max_tokens=tokens, ignore_eos=True)


def first_token(engine: Engine, prompt: Sequence[int]) -> Usage:
    """Ask for one token."""
    (output,) = engine.generate([list(prompt)], answer_of(1))
    return output.usage


def seconds_a_token(engine: Engine, prompts: Sequence[list[int]], tokens: int) -> float:
    """Of decoding alone: from when all prompts have been read until the first answer is over.

    All answers have `tokens` tokens; what is counted is made by full batches.
    """
    # Prompts are read one after the other: the first answers go on until the last has begun.
    missing = {engine.add_request(prompt, answer_of(tokens)) for prompt in prompts}
    began_s = made = 0.0
    seconds = 0.0
    while engine.busy:
        deltas = engine.step()
        now_s = time.perf_counter()
        if seconds:
            continue
        if began_s:
            made += sum(len(delta.token_ids) for delta in deltas)
            if any(delta.usage is not None for delta in deltas):
                seconds = now_s - began_s
            continue
        missing -= {delta.request_id for delta in deltas}
        if not missing:
            began_s = now_s
        elif any(delta.usage is not None for delta in deltas):
            raise RuntimeError("the first answer was over before the last had begun")
    return seconds / made

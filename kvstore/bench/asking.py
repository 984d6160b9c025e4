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
    missing = {engine.add_request(prompt, answer_of(tokens)) for prompt in prompts}
    while missing:  # prompts are read one after the other, and the first answers go on meanwhile
        deltas = engine.step()
        missing -= {delta.request_id for delta in deltas}
        if any(delta.usage is not None for delta in deltas):
            raise RuntimeError("the first answer was over before the last had gone on")
    began_s, made, is_over = time.perf_counter(), 0, False
    while not is_over:
        deltas = engine.step()
        made += sum(len(delta.token_ids) for delta in deltas)
        is_over = any(delta.usage is not None for delta in deltas)
    seconds = time.perf_counter() - began_s
    while engine.busy:
        engine.step()
    return seconds / made

"""Prefill and decode, measured alike in every engine: through one call that generates n tokens.

Prefill is the time of one token. Decode is what n more tokens take: the time of
n + 1, less the time of one, on prompts of the same length. No prompt comes twice,
so no cache of prefixes has a part in it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from kvstore.bench.turns import Turn

if TYPE_CHECKING:
    from kvstore.engine.engine import Engine

Prompts = Sequence[Sequence[int]]
Generate = Callable[[Prompts, int], float]
"""Seconds until each prompt has exactly that many new tokens, greedy, all prompts together."""

DECODE_PROMPT_TOKENS = 64
_LOWEST_TOKEN, _HIGHEST_TOKEN = 300, 40_000  # ordinary words: no control tokens


def prompts(count: int, tokens: int, seed: int) -> Prompts:
    """Random prompts; another seed, other prompts."""
    drawn = random.Random(seed)
    return [
        [drawn.randint(_LOWEST_TOKEN, _HIGHEST_TOKEN) for _ in range(tokens)] for _ in range(count)
    ]


def prefilling(generate: Generate, tokens: int) -> Turn:
    """A turn that computes a prompt of `tokens` nobody has seen."""
    seeds = _seeds()
    return lambda: generate(prompts(1, tokens, next(seeds)), 1)


def decoding(generate: Generate, batch: int, tokens: int) -> Turn:
    """A turn whose seconds are those of `tokens` decode steps of `batch` sequences."""
    seeds = _seeds()

    def turn() -> float:
        first = generate(prompts(batch, DECODE_PROMPT_TOKENS, next(seeds)), 1)
        both = generate(prompts(batch, DECODE_PROMPT_TOKENS, next(seeds)), tokens + 1)
        return both - first

    return turn


def by_engine(engine: Engine) -> Generate:
    """How our engine generates."""
    from kvstore.engine.sampling import SamplingParams

    def generate(asked: Prompts, tokens: int) -> float:
        outputs = engine.generate(
            [list(prompt) for prompt in asked],
            SamplingParams(max_tokens=tokens, ignore_eos=True),
        )
        if any(len(output.token_ids) != tokens for output in outputs):
            raise RuntimeError("the engine stopped early")
        return max(output.usage.total_s for output in outputs)

    return generate


_next_seed = iter(range(1 << 62))


def _seeds() -> Iterator[int]:
    """Numbers that no one else gets in this process."""
    return _next_seed

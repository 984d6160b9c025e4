"""What the engine's tests ask, and the answers, computed the slow way."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvstore.engine.batch import Batch, SequenceSpan
from kvstore.engine.loading import LoadedModel
from kvstore.engine.sampling import SamplingParams

BLOCK_TOKENS = 4
# Long and short, alike at the beginning and not, one of exactly two blocks, one of one token.
PROMPTS: list[list[int]] = [
    [i * 7 % 256 for i in range(50)],
    [i * 7 % 256 for i in range(30)] + [9] * 8,
    [200, 3, 17],
    [5] * 8,
    [77],
    [i * 31 % 256 for i in range(71)],
    [i * 7 % 256 for i in range(50)],
    [250, 251],
]
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)


def block_bytes(model: LoadedModel, tokens: int = BLOCK_TOKENS) -> int:
    c = model.config
    return c.kv_heads * c.layers * 2 * tokens * c.head_dim * 4


def greedy(model: LoadedModel, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """One sequence in one run of blocks, nothing shared, the whole prompt in one pass."""
    c = model.config
    slots = len(prompt) + count
    kv = torch.zeros(c.kv_heads, c.layers, 2, slots, c.head_dim)
    tokens, done = list(prompt), 0
    while len(tokens) < slots:
        span = SequenceSpan(len(tokens) - done, done, range(slots))
        batch = Batch.build([span], [tokens[done:]], block_tokens=1)
        done = len(tokens)
        tokens.append(int(model.decoder.forward(batch, kv).argmax()))
    return tuple(tokens[len(prompt) :])

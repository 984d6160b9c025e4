"""What the engine's tests ask, and the answers, computed the slow way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvstore.engine.attention import HostAttention
from kvstore.engine.batch import Batch, SequenceSpan
from kvstore.engine.calibration import Quantised
from kvstore.engine.engine import Engine
from kvstore.engine.loading import LoadedModel
from kvstore.engine.output import Delta, Output, Usage
from kvstore.engine.sampling import SamplingParams
from kvstore.store import BlockStore
from kvstore.tiers.hbm import TORCH_DTYPE

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


LONG = PROMPTS[0]  # 12 blocks that can be found, and 2 tokens more


def block_bytes(model: LoadedModel, tokens: int = BLOCK_TOKENS) -> int:
    c = model.config
    return c.kv_heads * c.layers * 2 * tokens * c.head_dim * 4


def greedy(
    model: LoadedModel, prompt: Sequence[int], count: int, kept: Quantised | None = None
) -> tuple[int, ...]:
    """One sequence in one run of blocks, nothing shared, the whole prompt in one pass."""
    c = model.config
    slots = len(prompt) + count
    dtype = model.decoder.dtype if kept is None else TORCH_DTYPE[kept.dtype]
    kv = torch.zeros(c.kv_heads, c.layers, 2, slots, c.head_dim, dtype=dtype)
    attention = HostAttention(c, kv.device, None if kept is None else kept.scales)
    tokens, done = list(prompt), 0
    while len(tokens) < slots:
        span = SequenceSpan(len(tokens) - done, done, range(slots))
        batch = Batch.build([span], [tokens[done:]], block_tokens=1)
        done = len(tokens)
        tokens.append(int(model.decoder.forward(batch, kv, attention=attention).argmax()))
    return tuple(tokens[len(prompt) :])


SOURCES = ("hbm_tokens", "ram_tokens", "nvme_tokens", "remote_tokens", "recomputed_tokens")


@contextmanager
def engine_over(
    model: LoadedModel, store: BlockStore | None, *, blocks: int = 256, **options: Any
) -> Iterator[Engine]:
    """An engine with an HBM of `blocks` blocks, found in order and empty of sequences after."""
    options = {"block_tokens": BLOCK_TOKENS, "prefill_chunk_tokens": 16, **options}
    with Engine(model, store=store, hbm_bytes=blocks * block_bytes(model), **options) as engine:
        yield engine
        engine.check_invariants()
        assert engine.stats().hbm_used_blocks == 0
    if store is not None:
        store.check_invariants()


def sources(usage: Usage) -> tuple[int, ...]:
    """Prompt tokens from hbm, ram, nvme, remote, and recomputed."""
    return tuple(getattr(usage, source) for source in SOURCES)


def drain(engine: Engine) -> list[Delta]:
    """All that the requests made by hand still give."""
    deltas = []
    while engine.busy:
        deltas += engine.step()
    return deltas


def check(outputs: Sequence[Output], expected: Sequence[tuple[int, ...]]) -> None:
    """The right tokens, and every prompt token accounted for."""
    assert [output.token_ids for output in outputs] == list(expected)
    for output in outputs:
        assert sum(sources(output.usage)) == output.usage.prompt_tokens

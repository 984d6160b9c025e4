"""Drawing for many sequences at once, where their logits are.

What `Sampler` does for one row on a CPU, for all rows in a few operations. Only tokens come to
the host, and for each row whether it could be drawn here: nucleus sampling looks at CANDIDATES
tokens, which reach the wanted mass almost always.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvstore.engine.batch import to_device
from kvstore.engine.sampling_params import SamplingParams

CANDIDATES = 1024


class Draw(NamedTuple):
    """How one row is drawn: by `params`, at `point`, uniform in [0, 1)."""

    params: SamplingParams
    point: float


def can_draw(params: SamplingParams) -> bool:
    """Whether rows of these are drawn here; penalties need what was drawn before."""
    return not params.penalised and params.top_k <= CANDIDATES


def draw_rows(draws: Sequence[Draw], logits: Tensor) -> list[int | None]:
    """A token for each row of `logits` [len(draws), vocab] float32, any device.

    None where CANDIDATES were too few. Waits for the device once. The same draws give the same
    tokens whatever the other rows are.
    """
    return [None if token < 0 else token for token in _drawn(draws, logits).tolist()]


def rows_of(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of logits, copied. Does not wait for the device."""
    return logits.index_select(0, to_device(np.array(rows, dtype=np.int64), logits.device))


def _drawn(draws: Sequence[Draw], logits: Tensor) -> Tensor:
    """int64 [rows], -1 for None. Does not wait for the device."""
    values = [
        (d.params.temperature, d.params.top_k, d.params.top_p, d.params.min_p, d.point)
        for d in draws
    ]
    there = to_device(np.array(values, dtype=np.float64), logits.device)
    temperature, top_k, top_p, min_p, point = there.unbind(1)
    wide = logits.double()
    greedy = temperature == 0
    scale = torch.where(greedy, 1.0, temperature)[:, None]
    weights = torch.exp((wide - wide.amax(1, keepdim=True)) / scale)
    drawn = torch.where(greedy, logits.argmax(1), -1)
    free = [not d.params.greedy and not _is_cut(d.params, weights.shape[1]) for d in draws]
    if any(free):  # all tokens are candidates, in the vocabulary's order
        rows = to_device(np.array(free), logits.device)
        drawn = torch.where(rows, _at(weights, min_p, point), drawn)
    if not all(f or d.params.greedy for f, d in zip(free, draws, strict=True)):
        tokens, best, enough = _candidates(weights, top_k, top_p)
        places = _at(best, min_p, point)
        cut = (drawn < 0) & enough
        drawn = torch.where(cut, tokens.gather(1, places[:, None])[:, 0], drawn)
    return drawn


def _is_cut(params: SamplingParams, vocabulary: int) -> bool:
    return 0 < params.top_k < vocabulary or params.top_p < 1


def _candidates(weights: Tensor, top_k: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [rows, n], likeliest first, what is left of their weights, and whether n is enough.

    Left are the best top_k, and then of these the fewest that have top_p of their mass.
    """
    best, tokens = weights.topk(min(CANDIDATES, weights.shape[1]), 1)
    limited = (top_k > 0) & (top_k < weights.shape[1])
    rank = torch.arange(best.shape[1], device=weights.device)
    best = torch.where((rank < top_k[:, None]) | ~limited[:, None], best, 0.0)
    wanted = top_p * torch.where(limited, best.sum(1), weights.sum(1))
    before = best.cumsum(1) - best
    enough = limited | (best.sum(1) >= wanted)
    is_out = (top_p < 1)[:, None] & (before >= wanted[:, None])
    return tokens, torch.where(is_out, 0.0, best), enough


def _at(weights: Tensor, min_p: Tensor, point: Tensor) -> Tensor:
    """[rows]: where the cumulative weights pass `point` of their sum."""
    floor = (min_p * weights.amax(1))[:, None]
    cumulative = torch.where(weights >= floor, weights, 0.0).cumsum(1)
    total = cumulative[:, -1:]
    # Below the sum even where it is rounded up to it: behind it are only tokens that are out.
    target = torch.minimum(point[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]

"""Attention over paged KV on a CPU, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class Span(Protocol):
    """One sequence's share of a batch; see kvstore.engine.batch.SequenceSpan."""

    @property
    def query_tokens(self) -> int: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def block_table(self) -> Sequence[int]: ...


def paged_attention(
    query: Tensor, kv: Tensor, layer: int, spans: Sequence[Span], block_tokens: int
) -> Tensor:
    """Causal attention of every span over its own blocks; [T, heads, head_dim], as `query`."""
    out = torch.empty_like(query)
    row = 0
    groups = query.shape[1] // kv.shape[0]
    for span in spans:
        total = span.context_tokens + span.query_tokens
        count = -(-total // block_tokens)
        table = torch.tensor(span.block_table[:count])
        slots = (table[:, None] * block_tokens + torch.arange(block_tokens)).flatten()[:total]
        key, value = kv[:, layer, 0, slots], kv[:, layer, 1, slots]
        q = query[row : row + span.query_tokens].transpose(0, 1)
        mask = torch.ones(span.query_tokens, total, dtype=torch.bool).tril(span.context_tokens)
        attended = scaled_dot_product_attention(
            q[None],
            key.repeat_interleave(groups, 0)[None],
            value.repeat_interleave(groups, 0)[None],
            attn_mask=mask,
        )
        out[row : row + span.query_tokens] = attended[0].transpose(0, 1)
        row += span.query_tokens
    return out

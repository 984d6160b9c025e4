"""How the decoder writes and reads paged KV: what a device has to offer, behind one interface.

An `Attention` makes two functions for each batch, which are called once a layer: one writes
the batch's own K and V, the other attends to all that its sequences have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvstore.engine.batch import SequenceSpan
from kvstore.engine.config import ModelConfig
from kvstore.kernels.paged_attention import PagedAttention, Workspace
from kvstore.kernels.quantise import quantise

# `write(pairs, layer)`: K and V, [rows, 2, kv_heads, head_dim]; of rows that pad the batch
# nothing is written.
Write = Callable[[Tensor, int], None]
# `attend(query, layer)`: float32 [rows, heads * head_dim] in and out; rows that pad the batch
# come back as zeros.
Attend = Callable[[Tensor, int], Tensor]


class Attention(Protocol):
    """`kv` is [kv_heads, layers, 2, slots, head_dim], of a device that the attention is for."""

    def writer(self, slots: Tensor, kv: Tensor) -> Write:
        """For rows that go to `slots`, int64 [T]; negative ones pad the batch and come last."""
        ...

    def of_spans(self, spans: Sequence[SequenceSpan], kv: Tensor, block_tokens: int) -> Attend:
        """For rows in the order of the spans."""
        ...

    def of_tables(
        self, block_tables: Tensor, context_lens: Tensor, kv: Tensor, block_tokens: int
    ) -> Attend:
        """For one row a sequence, which attends to its first `context_lens[row]` tokens.

        int32 [B, max_blocks] and [B]; sequences of 0 tokens pad the batch and come last.
        """
        ...


class HostAttention:
    """Plain torch, and the same bits in any company: docs/adr/0020-determinism.md."""

    def __init__(
        self, config: ModelConfig, device: torch.device, scales: Tensor | None = None
    ) -> None:
        """`scales` float32 [kv_heads, layers, 2], for KV of fp8 or int8."""
        self._heads = config.heads
        self._scales = scales
        self._workspace = Workspace(device)

    def writer(self, slots: Tensor, kv: Tensor) -> Write:
        slots = slots[: int((slots >= 0).sum())]

        def write(pairs: Tensor, layer: int) -> None:
            write_pairs(pairs[: len(slots)], kv, layer, slots, self._scales)

        return write

    def of_spans(self, spans: Sequence[SequenceSpan], kv: Tensor, block_tokens: int) -> Attend:
        return PagedAttention(
            spans,
            kv,
            heads=self._heads,
            block_tokens=block_tokens,
            workspace=self._workspace,
            scales=self._scales,
        )

    def of_tables(
        self, block_tables: Tensor, context_lens: Tensor, kv: Tensor, block_tokens: int
    ) -> Attend:
        spans = [
            SequenceSpan(1, tokens - 1, table)
            for tokens, table in zip(context_lens.tolist(), block_tables.tolist(), strict=True)
            if tokens
        ]
        return self.of_spans(spans, kv, block_tokens)


def write_pairs(
    pairs: Tensor, kv: Tensor, layer: int, slots: Tensor, scales: Tensor | None
) -> None:
    """K and V, [T, 2, kv_heads, head_dim], to slots [T] of one layer, quantised if need be."""
    pairs = pairs.permute(2, 1, 0, 3)
    if scales is None:
        kv[:, layer].index_copy_(2, slots, pairs)
        return
    coded = quantise(pairs, scales[:, layer, :, None, None], kv.dtype)
    # As bits, since torch does not copy every dtype by index.
    kv[:, layer].view(torch.int8).index_copy_(2, slots, coded.view(torch.int8))

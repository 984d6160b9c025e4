"""What the kernels must compute, written to be obviously right, however slow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.kernels.paged_attention import Span


def paged_attention(
    query: Tensor, kv: Tensor, layer: int, spans: Sequence[Span], block_tokens: int
) -> Tensor:
    """Causal attention, token by token and head by head, in float64.

    `query` is [T, heads, head_dim], `kv` [kv_heads, layers, 2, slots, head_dim];
    float64 [T, heads, head_dim] comes back.
    """
    out = torch.empty(query.shape, dtype=torch.float64)
    shared = query.shape[1] // kv.shape[0]
    row = 0
    for span in spans:
        for position in range(span.context_tokens, span.context_tokens + span.query_tokens):
            slots = [
                span.block_table[p // block_tokens] * block_tokens + p % block_tokens
                for p in range(position + 1)
            ]
            for head in range(query.shape[1]):
                keys, values = kv[head // shared, layer][:, slots].double()
                scores = keys @ query[row, head].double() / query.shape[2] ** 0.5
                out[row, head] = torch.softmax(scores, 0) @ values
            row += 1
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square normalisation (arXiv:1910.07467), in float64."""
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def copy_out(kv: Tensor, blocks: Sequence[int], block_tokens: int) -> list[bytes]:
    """The canonical bytes of each block of `kv` [kv_heads, layers, 2, slots, head_dim]."""
    out = []
    for block in blocks:
        tokens = range(block * block_tokens, (block + 1) * block_tokens)
        piece = b"".join(
            kv[head, layer, half, token, element].reshape(1).view(torch.uint8).numpy().tobytes()
            for head in range(kv.shape[0])
            for layer in range(kv.shape[1])
            for half in range(2)
            for token in tokens
            for element in range(kv.shape[4])
        )
        out.append(piece)
    return out

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


def decode(
    query: Tensor,
    kv: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    block_tokens: int,
    scales: Tensor | None = None,
) -> Tensor:
    """One query token a sequence, sequence by sequence, in float64.

    Arguments are those of `paged_attention_cuda.decode`, on any device; float64
    [B, heads, head_dim] comes back, zeros for sequences without context.
    """
    heads, head_dim = query.shape[1:]
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    for row, context in enumerate(context_lens.tolist()):
        if context == 0:
            continue
        positions = torch.arange(context, device=kv.device)
        blocks = block_tables[row].long()[positions // block_tokens]
        slots = blocks * block_tokens + positions % block_tokens
        # By their bits, since not every device picks elements of every type.
        bits = kv.view(torch.uint8).view(*kv.shape, -1)[:, layer, :, slots]
        pairs = bits.flatten(-2).view(kv.dtype).double()
        if scales is not None:
            pairs = pairs * scales[:, layer, :, None, None].double()
        keys, values = pairs.repeat_interleave(heads // kv.shape[0], 0).unbind(1)
        scores = (keys @ query[row].double()[:, :, None])[..., 0] / head_dim**0.5
        out[row] = (torch.softmax(scores, -1)[:, None] @ values)[:, 0]
    return out


def write_kv(
    key: Tensor,
    value: Tensor,
    kv: Tensor,
    layer: int,
    slots: Tensor,
    rotation: tuple[Tensor, Tensor, Tensor] | None = None,
    scales: Tensor | None = None,
) -> None:
    """What `write_kv_cuda.write_kv` must leave in `kv`, token by token."""
    largest = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}.get(kv.dtype)
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        rows = [key[token].float(), value[token].float()]
        if rotation is not None:
            positions, cosines, sines = rotation
            cosine, sine = cosines[positions[token]], sines[positions[token]]
            low, high = rows[0].chunk(2, -1)
            rows[0] = torch.cat([low * cosine - high * sine, high * cosine + low * sine], -1)
        for half, row in enumerate(rows):
            if scales is not None and largest is not None:
                row = (row / scales[:, layer, half, None]).clamp(-largest, largest)
            row = row.round() if kv.dtype == torch.int8 else row
            kv.view(torch.uint8)[:, layer, half, slot] = row.to(kv.dtype).view(torch.uint8)


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

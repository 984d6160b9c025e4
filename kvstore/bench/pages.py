"""Pages of random content in random order, as they lie on a device after hours of use."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.bench.sizes import DecodeShape
from kvstore.engine.config import ModelConfig

# Elements that are made at once, so that a float32 copy of them has room.
_PIECE = 1 << 28
_SEED = 20_240


def random_kv(
    model: ModelConfig, slots: int, layers: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[kv_heads, layers, 2, slots, head_dim], normally distributed."""
    kv = torch.empty((model.kv_heads, layers, 2, slots, model.head_dim), dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(_SEED)
    for piece in torch.split(kv.view(-1), _PIECE):
        if dtype.itemsize > 1:
            piece.normal_(generator=generator)
        else:
            wide = torch.empty(piece.shape, dtype=torch.bfloat16, device=device)
            piece.copy_(wide.normal_(generator=generator))
    return kv


def shuffled(blocks: int) -> list[int]:
    """All blocks, in an order that has no neighbours on purpose."""
    generator = torch.Generator().manual_seed(_SEED)
    order: list[int] = torch.randperm(blocks, generator=generator).tolist()
    return order


def block_tables(shape: DecodeShape, block_tokens: int, device: torch.device) -> Tensor:
    """int32 [batch, blocks of a sequence]: blocks from 0 on, shuffled among all sequences."""
    blocks = -(-shape.context_tokens // block_tokens)
    table = torch.tensor(shuffled(shape.batch * blocks), dtype=torch.int32)
    return table.view(shape.batch, blocks).to(device)

"""Blocks between the paged KV tensor and buffers in canonical layout, on a CPU.

A block's share of one head, layer and half (K or V) is contiguous on both sides:
`block_tokens * head_dim` elements, copied as one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def copy_out(
    kv: Tensor, blocks: Sequence[int], views: Sequence[memoryview], block_tokens: int
) -> None:
    """Write each block of `kv` to its view, in canonical layout.

    `kv` is [kv_heads, layers, 2, slots, head_dim], contiguous; every view is one block
    long, writable, and the caller's.
    """
    pieces = _pieces(kv, block_tokens)
    for block, view in zip(blocks, views, strict=True):
        _pieces_of(view, pieces)[:] = pieces[:, block]


def copy_in(
    kv: Tensor, views: Sequence[memoryview], blocks: Sequence[int], block_tokens: int
) -> None:
    """Fill each block of `kv` from its view: the inverse of `copy_out`."""
    pieces = _pieces(kv, block_tokens)
    for block, view in zip(blocks, views, strict=True):
        pieces[:, block] = _pieces_of(view, pieces)


def _pieces_of(view: memoryview, pieces: NDArray[np.void]) -> NDArray[np.void]:
    """A block's buffer in the same pieces; ValueError where it is not one block long."""
    return np.frombuffer(view, pieces.dtype).reshape(len(pieces))


def _pieces(kv: Tensor, block_tokens: int) -> NDArray[np.void]:
    """`kv` as [kv_heads * layers * 2, blocks] of opaque pieces; no copy."""
    heads, layers, pair, slots, head_dim = kv.shape
    piece_bytes = block_tokens * head_dim * kv.element_size()
    raw: NDArray[np.uint8] = kv.view(torch.uint8).numpy()
    shape = (heads * layers * pair, slots // block_tokens, piece_bytes)
    pieces: NDArray[np.void] = raw.reshape(shape).view(np.dtype((np.void, piece_bytes)))[..., 0]
    return pieces

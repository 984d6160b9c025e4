"""What the block copies must do, one head of one layer at a time, in plain torch on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.kernels.paged_tensors import PagedTensors

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
TINY = 2.0**-100


def quantise(piece: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A piece as `dtype` and its float32 scale: the largest magnitude becomes the largest number.

    A piece of nothing larger than TINY is zeros, and its scale is 0.
    """
    wide, limit = piece.float(), torch.tensor(LARGEST[dtype])
    largest = wide.abs().max()
    if largest < TINY:
        return torch.zeros_like(wide).to(dtype), torch.zeros(())
    scaled = (wide * (limit / largest)).clamp(-limit, limit)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), largest / limit


def dequantise(piece: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (piece.float() * scale).to(dtype)


def block_of(
    pages: PagedTensors, runs: Sequence[int], block_tokens: int, dtype: torch.dtype, heads: range
) -> bytes:
    """The canonical bytes of the block whose tokens lie in `runs`; see `KernelCopies.copy_out`."""
    parts, own = [], pages.views[0].dtype
    places = _places(pages, runs, block_tokens)
    for head in heads:
        scales = b""
        for view in pages.views:
            rows = (view[place[0], head, place[1]] for place in places if place is not None)
            piece = torch.stack([*rows])
            if dtype in LARGEST and own != dtype:
                piece, scale = quantise(piece, dtype)
                scales += raw(scale)
            parts.append(raw(piece.to(dtype)))
        parts.append(scales)
    return b"".join(parts)


def fill(
    pages: PagedTensors,
    runs: Sequence[int],
    block: bytes,
    block_tokens: int,
    dtype: torch.dtype,
    heads: range,
    layers: range,
) -> None:
    """Write the tokens of a block to their pages; see `KernelCopies.copy_in`."""
    own, head_dim = pages.views[0].dtype, pages.shape[3]
    shape, pieces = (block_tokens, head_dim), len(pages.views)
    size = block_tokens * head_dim * dtype.itemsize
    scaled = dtype in LARGEST and own != dtype
    head_bytes = pieces * (size + 4 * scaled)
    places = _places(pages, runs, block_tokens)
    for number, head in enumerate(heads):
        start = number * head_bytes
        for piece in range(2 * layers.start, 2 * layers.stop):
            at = start + piece * size
            values = _tensor(block[at : at + size], dtype).view(shape)
            if scaled:
                at = start + pieces * size + 4 * piece
                values = dequantise(values, _tensor(block[at : at + 4], torch.float32), own)
            for token, place in enumerate(places):
                if place is not None:
                    pages.views[piece][place[0], head, place[1]] = values[token].to(own)


def _places(
    pages: PagedTensors, runs: Sequence[int], block_tokens: int
) -> list[tuple[int, int] | None]:
    """Page and offset of each token; negative pages are left out."""
    each = block_tokens // len(runs)
    return [
        divmod(run + i, pages.shape[2]) if run >= 0 else None for run in runs for i in range(each)
    ]


def raw(tensor: Tensor) -> bytes:
    """A tensor's bytes, in its own order of indices."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)

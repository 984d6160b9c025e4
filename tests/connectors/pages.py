"""An engine's pages for tests: any order of dimensions, any bits, and a reader that is slow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.connectors.page_layout import PageLayout
from kvstore.layout import DTYPE_BYTES, Shard

TORCH_DTYPE = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}


def random_tensors(layout: PageLayout, seed: int = 0) -> list[Tensor]:
    """What an engine would allocate, every bit pattern in it, NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    size = DTYPE_BYTES[layout.dtype]
    elements = layout.elements
    if layout.strides is not None:
        elements = 1 + sum(
            stride * (n - 1) for stride, n in zip(layout.strides, layout.shape, strict=True)
        )
    return [
        torch.randint(0, 256, (elements * size,), generator=generator)
        .to(torch.uint8)
        .view(TORCH_DTYPE[layout.dtype])
        for _ in range(layout.tensors)
    ]


def element_bytes(
    layout: PageLayout,
    tensors: Sequence[Tensor],
    *,
    layer: int,
    half: int,
    page: int,
    head: int,
    token: int,
    element: int,
) -> NDArray[np.uint8]:
    """The bytes of one element, found by counting; writable, a view."""
    at = {"L": layer, "K": half, "B": page, "H": head, "N": token, "D": element}
    number = 0
    if "L" not in layout.order:
        number = layer
    if "K" not in layout.order:
        number = number * 2 + half
    sizes = dict(zip(layout.order, layout.shape, strict=True))
    order = layout.order
    if layout.keys_transposed and half == 0:
        order = order.removesuffix("ND") + "DN"
    index = 0
    if layout.strides is not None:
        strides = dict(zip(layout.order, layout.strides, strict=True))
        if order != layout.order:
            strides["N"], strides["D"] = 1, layout.block_tokens
        index = sum(at[letter] * strides[letter] for letter in order)
    else:
        for letter in order:
            index = index * sizes[letter] + at[letter]
    size = DTYPE_BYTES[layout.dtype]
    raw: NDArray[np.uint8] = tensors[number].view(torch.uint8).numpy()
    return raw[index * size : (index + 1) * size]


def slow_block(
    layout: PageLayout, tensors: Sequence[Tensor], table: Sequence[int], tokens: range, shard: Shard
) -> bytes:
    """The canonical bytes of some tokens of a sequence, element by element."""
    pieces = []
    for head, layer, half, token, element in itertools.product(
        range(shard.start, shard.stop),
        range(layout.layers),
        range(2),
        tokens,
        range(layout.head_dim),
    ):
        page, offset = table[token // layout.block_tokens], token % layout.block_tokens
        found = element_bytes(
            layout,
            tensors,
            layer=layer,
            half=half,
            page=page,
            head=head - layout.held.start,
            token=offset,
            element=element,
        )
        pieces.append(found.tobytes())
    return b"".join(pieces)

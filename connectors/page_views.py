"""An engine's pages as the kernels see them: one view a layer and K or V."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.connectors.convert import shaped_bits
from kvstore.connectors.page_layout import PageLayout
from kvstore.errors import LayoutError
from kvstore.kernels.paged_tensors import PagedTensors

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}


def page_views(layout: PageLayout, tensors: Sequence[Tensor | NDArray[Any]]) -> PagedTensors:
    """Views of the heads that the tensors hold; copies nothing. Raises LayoutError.

    `tensors` are as `layout` says, on any one device.
    """
    if len(tensors) != layout.tensors:
        raise LayoutError(f"{len(tensors)} tensors, where the layout has {layout.tensors}")
    shaped = [shaped_bits(layout, tensor).view(_DTYPES[layout.dtype]) for tensor in tensors]
    return PagedTensors(
        tuple(
            _view(layout, shaped, layer, half) for layer in range(layout.layers) for half in (0, 1)
        )
    )


def _view(layout: PageLayout, tensors: Sequence[Tensor], layer: int, half: int) -> Tensor:
    """K or V of one layer, [blocks, heads, tokens, head_dim]."""
    letters = layout.order
    number = 0 if "L" in letters else layer
    if "K" not in letters:
        number = 2 * number + half
    view = tensors[number]
    for letter, index in (("L", layer), ("K", half)):
        if letter in letters:
            view = view.select(letters.index(letter), index)
            letters = letters.replace(letter, "")
    if layout.keys_transposed and half == 0:
        *outer, tokens, head_dim = view.shape
        view = view.view(*outer, head_dim, tokens).transpose(-1, -2)
    return view.permute([letters.index(letter) for letter in "BHND"])

"""Engine pages to canonical blocks and back: the same bits in another order.

Both sides are views, and every element is copied once, from where it is to where it belongs.
Bits are moved as integers, so that no dtype is looked into.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.connectors.page_layout import PageLayout
from kvstore.errors import LayoutError
from kvstore.layout import DTYPE_BYTES, Shard

Bits = NDArray[np.signedinteger[Any]]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_NUMPY_BITS = {1: np.int8, 2: np.int16, 4: np.int32}
_NAMED = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float8_e4m3fn: "float8_e4m3",
    torch.int8: "int8",
}


class Part(NamedTuple):
    """Pages of some layers and of K, V or both: bits [heads, layers, halves, blocks, N, D]."""

    layers: slice
    halves: slice
    bits: Bits


class Piece(NamedTuple):
    """Consecutive tokens of a sequence that are neighbours both in a page and in a block."""

    page: int  # physical block
    offset: int  # first token, within the page
    start: int  # first token, within the canonical block
    tokens: int


class Pages:
    """An engine's KV tensors, read and written as canonical blocks.

    Keeps views of the tensors, which stay the engine's. Any number of threads may read pages,
    and write different ones.
    """

    def __init__(self, layout: PageLayout, tensors: Sequence[Tensor | NDArray[Any]]) -> None:
        """`tensors` as `layout` says, on the CPU; their dimensions may be split or merged.

        Raises LayoutError where they are not what it says. Copies nothing.
        """
        if len(tensors) != layout.tensors:
            raise LayoutError(f"{len(tensors)} tensors, where the layout has {layout.tensors}")
        self.layout = layout
        views = [shaped_bits(layout, tensor) for tensor in tensors]
        elsewhere = {view.device for view in views if view.device.type != "cpu"}
        if elsewhere:
            raise LayoutError(f"pages are on {elsewhere}; for those there are DevicePages")
        self.parts = [
            Part(layers, halves, view.numpy()) for layers, halves, view in _parts(layout, views)
        ]

    def follow(self) -> Pages:
        """These pages, whose copies come after what the calling thread has told a device so far.

        In memory that the CPU computes in that has been done.
        """
        return self

    def copy_out(
        self, table: Sequence[int], first: int, views: Sequence[memoryview], block_tokens: int
    ) -> None:
        """Gather tokens `[first, first + len(views) * block_tokens)` of a sequence.

        `table` lists the sequence's physical blocks from its first token on. `views`, the
        caller's, are one canonical block each, of this layout's heads. Raises LayoutError.
        """
        held = self.layout.held
        last = first + len(views) * block_tokens
        pages = self._used(table, first, last)
        for i, view in enumerate(views):
            start = first + i * block_tokens
            block = self._block(view, held, block_tokens)
            for piece in self._pieces(pages, start, range(start, start + block_tokens)):
                inside = slice(piece.start, piece.start + piece.tokens)
                there = slice(piece.offset, piece.offset + piece.tokens)
                for part in self.parts:
                    block[:, part.layers, part.halves, inside] = part.bits[
                        :, :, :, piece.page, there
                    ]

    def copy_in(
        self,
        table: Sequence[int],
        first: int,
        views: Sequence[memoryview],
        block_tokens: int,
        shard: Shard,
        wanted: range,
    ) -> None:
        """Scatter blocks that begin at token `first`, as far as their tokens are in `wanted`.

        `views` hold the heads of `shard`; of these, the ones in the pages are written, and
        nothing else is touched. Raises LayoutError.
        """
        held = self.layout.held
        low, high = max(shard.start, held.start), min(shard.stop, held.stop)
        here = slice(low - held.start, high - held.start)
        from_ = slice(low - shard.start, high - shard.start)
        begin = max(wanted.start, first)
        end = min(wanted.stop, first + len(views) * block_tokens)
        if low >= high or begin >= end:
            return
        pages = self._used(table, begin, end)
        for i, view in enumerate(views):
            start = first + i * block_tokens
            block = self._block(view, shard, block_tokens)[from_]
            tokens = range(max(begin, start), min(end, start + block_tokens))
            for piece in self._pieces(pages, start, tokens):
                inside = slice(piece.start, piece.start + piece.tokens)
                there = slice(piece.offset, piece.offset + piece.tokens)
                for part in self.parts:
                    part.bits[here, :, :, piece.page, there] = block[
                        :, part.layers, part.halves, inside
                    ]

    def _block(self, view: memoryview, shard: Shard, block_tokens: int) -> Bits:
        """A canonical block's buffer as bits [heads, layers, 2, block_tokens, head_dim]."""
        layout = self.layout
        shape = (shard.heads, layout.layers, 2, block_tokens, layout.head_dim)
        dtype = _NUMPY_BITS[DTYPE_BYTES[layout.dtype]]
        if view.nbytes != np.prod(shape) * np.dtype(dtype).itemsize:
            raise LayoutError(f"a buffer of {view.nbytes} bytes is no block of {shape}")
        return np.frombuffer(view, dtype).reshape(shape)

    def check_table(self, table: Sequence[int], first: int, last: int) -> None:
        """Raises LayoutError unless tokens `[first, last)` lie in pages that there are."""
        self._used(table, first, last)

    def _used(self, table: Sequence[int], first: int, last: int) -> dict[int, int]:
        """Place in the table -> page, for tokens `[first, last)`.

        A page beyond the end would raise later; a negative one would silently be another.
        """
        tokens, blocks = self.layout.block_tokens, self.layout.blocks
        places = range(first // tokens, -(-last // tokens))
        if first < 0 or last > len(table) * tokens:
            raise LayoutError(f"{len(table)} pages do not hold tokens {first} to {last}")
        used = {place: int(table[place]) for place in places}
        if used and not (min(used.values()) >= 0 and max(used.values()) < blocks):
            raise LayoutError(f"the block table names pages outside the {blocks} that there are")
        return used

    def _pieces(self, pages: dict[int, int], start: int, wanted: range) -> Iterator[Piece]:
        """`wanted`, tokens of a sequence within the block that begins at `start`, by pages."""
        token = wanted.start
        while token < wanted.stop:
            index, offset = divmod(token, self.layout.block_tokens)
            tokens = min(self.layout.block_tokens - offset, wanted.stop - token)
            yield Piece(pages[index], offset, token - start, tokens)
            token += tokens


def shaped_bits(layout: PageLayout, tensor: Tensor | NDArray[Any]) -> Tensor:
    """A view of the tensor: integers of its elements' size, in the layout's dimensions.

    Raises LayoutError where there is no such view.
    """
    return _shaped(layout, _bits(layout, tensor))


def _bits(layout: PageLayout, tensor: Tensor | NDArray[Any]) -> Tensor:
    """The tensor's elements as integers. Raises LayoutError for another dtype."""
    if isinstance(tensor, np.ndarray):
        tensor = torch.from_numpy(tensor)
    size = DTYPE_BYTES[layout.dtype]
    raw = tensor.dtype in (torch.uint8, torch.uint16, torch.uint32)
    if tensor.itemsize != size or not (raw or _NAMED.get(tensor.dtype) == layout.dtype):
        raise LayoutError(f"a tensor of {tensor.dtype}, where the layout has {layout.dtype}")
    return tensor.detach().view(_BITS[size])


def _shaped(layout: PageLayout, tensor: Tensor) -> Tensor:
    """The tensor with the layout's dimensions. A view."""
    if layout.strides is not None:
        reach = sum(
            stride * (size - 1) for stride, size in zip(layout.strides, layout.shape, strict=True)
        )
        room = tensor.untyped_storage().nbytes() // tensor.itemsize - tensor.storage_offset()
        if reach >= room:
            raise LayoutError(f"strides {layout.strides} reach beyond a tensor of {room} elements")
        return tensor.as_strided(layout.shape, layout.strides)
    if tensor.numel() != layout.elements:
        raise LayoutError(
            f"a tensor of {tuple(tensor.shape)}, where {layout.order} is {layout.shape}"
        )
    try:
        return tensor.view(layout.shape)
    except RuntimeError as error:
        raise LayoutError(
            f"a tensor of {tuple(tensor.shape)} with strides {tensor.stride()} cannot be seen as "
            f"{layout.order} {layout.shape}"
        ) from error


def _parts(layout: PageLayout, views: list[Tensor]) -> Iterator[tuple[slice, slice, Tensor]]:
    """The tensors as [heads, layers, halves, blocks, N, D], as few as strides allow."""
    order = layout.order
    every, both = slice(None), slice(None)
    halves = {0: slice(0, 1), 1: slice(1, 2)}
    if "K" in order and not layout.keys_transposed:
        grouped = [(both, views)]
    elif "K" in order:
        at = order.index("K")
        grouped = [(halves[half], [view.narrow(at, half, 1) for view in views]) for half in (0, 1)]
    else:
        grouped = [(halves[half], views[half::2]) for half in (0, 1)]
    for half, tensors in grouped:
        if layout.keys_transposed and half == halves[0]:
            tensors = [_transposed(tensor) for tensor in tensors]
        six = [_canonical(order, tensor) for tensor in tensors]
        joined = six[0] if len(six) == 1 else _joined(six)
        if joined is not None:
            yield every, half, joined
        else:
            for layer, tensor in enumerate(six):
                yield slice(layer, layer + 1), half, tensor


def _transposed(tensor: Tensor) -> Tensor:
    """[..., N, D], seen by token though its elements lie [..., D, N]."""
    *outer, tokens, head_dim = tensor.shape
    return tensor.view(*outer, head_dim, tokens).transpose(-1, -2)


def _canonical(order: str, tensor: Tensor) -> Tensor:
    """Dimensions HLKBND; of those that the tensor does not have, one."""
    missing = [letter for letter in "LK" if letter not in order]
    for _ in missing:
        tensor = tensor.unsqueeze(0)
    named = "".join(reversed(missing)) + order
    return tensor.permute([named.index(letter) for letter in "HLKBND"])


def _joined(layers: list[Tensor]) -> Tensor | None:
    """Layers that lie at equal distances in one allocation, as one tensor; else None."""
    first = layers[0]
    storage = first.untyped_storage().data_ptr()
    offsets = [tensor.storage_offset() for tensor in layers]
    step = offsets[1] - offsets[0]
    even = all(after - before == step for before, after in pairwise(offsets))
    same = all(
        tensor.untyped_storage().data_ptr() == storage and tensor.stride() == first.stride()
        for tensor in layers
    )
    if not (even and same and step > 0):
        return None
    shape, strides = list(first.shape), list(first.stride())
    shape[1], strides[1] = len(layers), int(step)
    return first.as_strided(shape, strides)

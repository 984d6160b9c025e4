"""Blocks between pages and buffers by the device's copy engines: no kernel, no multiprocessor.

A block is many pieces in the pages, one for each head, layer and K or V, at one distance: a
two-dimensional copy. `fastest` measures which way is better for a block size on the device at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple, Protocol

import torch

from kvstore.errors import LayoutError
from kvstore.kernels.block_copy_cuda import (
    BlockFormat,
    Buffers,
    addresses,
    checked_runs,
    part_of,
)
from kvstore.kernels.cuda_module import Rows, Runtime, runtime_of
from kvstore.kernels.paged_tensors import PagedTensors, steps

REPEATS = 5


class BlockCopies(Protocol):
    """One way of copying between pages and buffers; `KernelCopies` says what the verbs do."""

    def copy_out(
        self,
        runs: Sequence[int],
        buffers: Buffers,
        *,
        layers: range | None = None,
        heads: range | None = None,
    ) -> None: ...

    def copy_in(
        self,
        runs: Sequence[int],
        buffers: Buffers,
        *,
        layers: range | None = None,
        heads: range | None = None,
    ) -> None: ...


class DmaCopies:
    """Copies of bits by DMA, on torch's current stream. See `KernelCopies` for who owns what.

    For pages like the HBM tier's: the tokens of a page are contiguous in a head, and all layers
    of K and V lie at one distance.
    """

    def __init__(
        self, pages: PagedTensors, block_tokens: int, *, runtime: Runtime | None = None
    ) -> None:
        """Raises LayoutError for pages that are not like this."""
        self.pages = pages
        self.format = BlockFormat(pages, block_tokens, pages.views[0].dtype)
        self._runtime = runtime or runtime_of(pages.views[0])
        first, second = (view.data_ptr() for view in pages.views[:2])
        self._pitch = second - first
        even = all(
            view.data_ptr() == first + number * self._pitch
            for number, view in enumerate(pages.views)
        )
        dense = all(steps(view)[2:] in ((pages.shape[3], 1), (0, 1)) for view in pages.views[:2])
        if self._pitch <= 0 or not even or not dense:
            raise LayoutError("DMA needs dense pages and layers at one distance; use the kernel")

    def copy_out(
        self,
        runs: Sequence[int],
        buffers: Buffers,
        *,
        layers: range | None = None,
        heads: range | None = None,
    ) -> None:
        self._copy(runs, buffers, layers, heads, out=True)

    def copy_in(
        self,
        runs: Sequence[int],
        buffers: Buffers,
        *,
        layers: range | None = None,
        heads: range | None = None,
    ) -> None:
        self._copy(runs, buffers, layers, heads, out=False)

    def _copy(
        self,
        runs: Sequence[int],
        buffers: Buffers,
        layers: range | None,
        heads: range | None,
        out: bool,
    ) -> None:
        if not len(buffers):
            return
        layers = part_of(layers, self.pages.layers, "layers")
        heads = part_of(heads, self.pages.shape[1], "heads")
        tokens = self.format.block_tokens
        slots = checked_runs(runs, len(buffers), self.pages, tokens, out)
        where = addresses(buffers, len(heads) * self.format.head_bytes, self.pages, out)
        token_bytes = self.pages.shape[3] * self.format.dtype.itemsize
        width = tokens // slots.shape[1] * token_bytes
        for buffer, in_block in zip(where.tolist(), slots.tolist(), strict=True):
            for number, slot in enumerate(in_block):
                if slot < 0:
                    continue
                for offset, page, rows in self._rectangles(slot, layers, heads):
                    block = Rows(buffer + offset + number * width, tokens * token_bytes)
                    pages = Rows(page, self._pitch)
                    target, source = (block, pages) if out else (pages, block)
                    self._runtime.copy_rows(target, source, width, rows)

    def _rectangles(self, slot: int, layers: range, heads: range) -> list[tuple[int, int, int]]:
        """What one run is made of: offset in the buffer, address in the pages, rows."""
        size = self.format.dtype.itemsize
        block_stride, head_stride, _, _ = steps(self.pages.views[0])
        page, offset = divmod(slot, self.pages.shape[2])
        first = self.pages.views[2 * layers.start].data_ptr() + size * (
            page * block_stride + offset * self.pages.shape[3]
        )
        skipped = 2 * layers.start * self.format.block_tokens * self.pages.shape[3] * size
        rows = 2 * len(layers)
        # Where the next head's first layer follows this one's last, all heads are one copy.
        if len(layers) == self.pages.layers and head_stride * size == rows * self._pitch:
            return [(0, first + heads.start * head_stride * size, rows * len(heads))]
        return [
            (number * self.format.head_bytes + skipped, first + head * head_stride * size, rows)
            for number, head in enumerate(heads)
        ]


class Measured(NamedTuple):
    """How long one way takes for the blocks that it was measured with, in seconds."""

    copies: BlockCopies
    out_s: float
    in_s: float


def measured(copies: BlockCopies, runs: Sequence[int], buffers: Buffers) -> Measured:
    """Median of a few copies each way, on torch's current CUDA stream, which it waits for.

    Overwrites the buffers with the blocks, and then the blocks with the same bytes.
    """
    event: Callable[..., Any] = torch.cuda.Event
    times: dict[str, list[float]] = {"out": [], "in": []}
    for turn in range(REPEATS + 1):
        for way, copy in (("out", copies.copy_out), ("in", copies.copy_in)):
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            copy(runs, buffers)
            end.record()
            end.synchronize()
            if turn:  # the first one compiles
                times[way].append(begin.elapsed_time(end) / 1e3)
    return Measured(copies, median(times["out"]), median(times["in"]))


def fastest(ways: Sequence[BlockCopies], runs: Sequence[int], buffers: Buffers) -> Measured:
    """The one of `ways` that needs the least time there and back."""
    return min((measured(way, runs, buffers) for way in ways), key=lambda m: m.out_s + m.in_s)

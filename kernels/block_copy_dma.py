"""Blocks between pages and buffers by the device's copy engines: no kernel, no multiprocessor.

A block is many pieces in the pages, one for each head, layer and K or V, at one distance: a
two-dimensional copy. `fastest` measures which way is better for a block size on the device at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.errors import LayoutError
from kvstore.kernels.block_copies import BlockCopies, BlockFormat, Buffers
from kvstore.kernels.block_copy_cuda import KernelCopies
from kvstore.kernels.cuda_module import Rows, Runtime
from kvstore.kernels.paged_tensors import PagedTensors, steps

REPEATS = 5
# About 2 ms of the device's cycles, in which the host prepares what is measured.
_HEAD_START_CYCLES = 4_000_000
MAX_PITCH_BYTES = (1 << 31) - 1  # of all CUDA devices so far (cudaDevAttrMaxPitch)


class DmaCopies(BlockCopies):
    """Copies of bits by DMA.

    For pages like the HBM tier's: the tokens of a page are contiguous in a head, and all layers
    of K and V lie at one distance, which is less than 2 GiB.
    """

    def __init__(
        self, pages: PagedTensors, block_tokens: int, *, runtime: Runtime | None = None
    ) -> None:
        """Raises LayoutError for pages that are not like this."""
        super().__init__(pages, BlockFormat(pages, block_tokens, pages.views[0].dtype), runtime)
        first, second = (view.data_ptr() for view in pages.views[:2])
        self._pitch = second - first
        even = all(
            view.data_ptr() == first + number * self._pitch
            for number, view in enumerate(pages.views)
        )
        dense = all(steps(view)[2:] in ((pages.shape[3], 1), (0, 1)) for view in pages.views[:2])
        if self._pitch <= 0 or not even or not dense:
            raise LayoutError("DMA needs dense pages and layers at one distance; use the kernel")
        if self._pitch > MAX_PITCH_BYTES:
            raise LayoutError(
                f"DMA takes {MAX_PITCH_BYTES} bytes from K of a layer to its V, "
                f"not {self._pitch}; use the kernel"
            )

    def _start(
        self,
        slots: NDArray[np.int32],
        where: NDArray[np.uint64],
        layers: range,
        heads: range,
        out: bool,
    ) -> None:
        tokens = self.format.block_tokens
        token_bytes = self.pages.shape[3] * self.format.dtype.itemsize
        width = tokens // slots.shape[1] * token_bytes
        in_buffer, in_pages, rows = self._rectangles(layers, heads)
        run_offsets = width * np.arange(slots.shape[1])
        in_block = where.astype(np.int64)[:, None, None] + run_offsets[:, None] + in_buffer
        in_page = self._first(slots)[..., None] + in_pages
        wanted = slots >= 0
        block = Rows(in_block[wanted].ravel().tolist(), tokens * token_bytes)
        pages = Rows(in_page[wanted].ravel().tolist(), self._pitch)
        target, source = (block, pages) if out else (pages, block)
        self._runtime.copy_rows(target, source, width, rows)

    def _first(self, slots: NDArray[np.int32]) -> NDArray[np.int64]:
        """Address of each slot in the first head and layer."""
        block_stride = steps(self.pages.views[0])[0]
        page, offset = np.divmod(slots.astype(np.int64), self.pages.shape[2])
        where: NDArray[np.int64] = page * block_stride + offset * self.pages.shape[3]
        where *= self.format.dtype.itemsize
        where += self.pages.views[0].data_ptr()
        return where

    def _rectangles(
        self, layers: range, heads: range
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """What one run is made of: offsets in the buffer and in the pages, and rows of each."""
        rows, number = 2 * len(layers), np.arange(len(heads))
        head_step = steps(self.pages.views[0])[1] * self.format.dtype.itemsize
        # Where the next head's first layer follows this one's last, all heads are one copy.
        if len(layers) == self.pages.layers and head_step == rows * self._pitch:
            return np.array([0]), np.array([heads.start * head_step]), rows * len(heads)
        piece_bytes = self.format.head_bytes // (2 * self.pages.layers)
        return (
            number * self.format.head_bytes + 2 * layers.start * piece_bytes,
            (number + heads.start) * head_step + 2 * layers.start * self._pitch,
            rows,
        )


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
    sleep: Callable[[int], None] = torch.cuda._sleep
    times: dict[str, list[float]] = {"out": [], "in": []}
    for turn in range(REPEATS + 1):
        for way, copy in (("out", copies.copy_out), ("in", copies.copy_in)):
            begin, end = event(enable_timing=True), event(enable_timing=True)
            sleep(_HEAD_START_CYCLES)
            begin.record()
            copy(runs, buffers)
            end.record()
            end.synchronize()
            if turn:  # the first one compiles
                times[way].append(begin.elapsed_time(end) / 1e3)
    return Measured(copies, median(times["out"]), median(times["in"]))


def ways_of(kernel: KernelCopies, *, runtime: Runtime | None = None) -> list[BlockCopies]:
    """`kernel`, and DMA if it can copy the kernel's pages as they lie."""
    try:
        return [kernel, DmaCopies(kernel.pages, kernel.format.block_tokens, runtime=runtime)]
    except LayoutError:
        return [kernel]


def fastest(ways: Sequence[BlockCopies], runs: Sequence[int], buffers: Buffers) -> Measured:
    """The one of `ways` that needs the least time there and back."""
    return min((measured(way, runs, buffers) for way in ways), key=lambda m: m.out_s + m.in_s)

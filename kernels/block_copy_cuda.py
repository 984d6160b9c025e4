"""Blocks between pages on a CUDA device and buffers in canonical layout: the launcher.

The kernel is csrc/block_copy.cu. It takes pages in any order and reads or writes the
buffers itself, in pinned host memory or on the device. `block_copy_dma.py` does the same with
the device's copy engines, for fewer kinds of pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.errors import LayoutError
from kvstore.kernels.block_copies import LIMIT, BlockCopies, BlockFormat
from kvstore.kernels.cuda_module import Runtime, address
from kvstore.kernels.paged_tensors import PagedTensors, steps

SOURCE = "block_copy.cu"
THREADS = 256
UNROLL = 4
# Enough threads to keep the bus busy, and few enough to leave the device to the model.
BUS_CTAS = 32
MAX_ELEMENTS = (1 << 31) - 1  # of one launch, which counts in 32 bits

PLAN = np.dtype(
    [
        ("bases", "u8"),
        ("block_stride", "i8"),
        ("head_stride", "i8"),
        ("token_strides", "i8", 2),
        ("element_strides", "i8", 2),
        ("head_bytes", "i8"),
        ("scale_offset", "i8"),
        ("page_tokens", "i4"),
        ("block_tokens", "i4"),
        ("run_tokens", "i4"),
        ("head_dim", "i4"),
        ("layers", "i4"),
        ("first_layer", "i4"),
        ("layer_count", "i4"),
        ("first_head", "i4"),
        ("heads", "i4"),
        ("blocks", "i4"),
        ("runs", "i4", LIMIT),
        ("buffers", "u8", LIMIT),
    ],
    align=True,
)

_TYPES = {
    torch.float32: "float",
    torch.bfloat16: "Bfloat16",
    torch.float16: "Half",
    torch.float8_e4m3fn: "Fp8",
    torch.int8: "Int8",
}
_BITS = {1: "unsigned char", 2: "unsigned short", 4: "unsigned"}


class KernelCopies(BlockCopies):
    """Copies by a kernel, of any pages."""

    def __init__(
        self,
        pages: PagedTensors,
        block_tokens: int,
        *,
        dtype: torch.dtype | None = None,
        runtime: Runtime | None = None,
        ctas: int = BUS_CTAS,
    ) -> None:
        """`dtype` is the buffers' (None: the pages' own), `ctas` the thread blocks of a copy.

        Raises LayoutError for what the kernel cannot do, KernelError without a device.
        """
        kept = BlockFormat(pages, block_tokens, dtype or pages.views[0].dtype)
        super().__init__(pages, kept, runtime)
        self._ctas = ctas
        device = pages.views[0].device
        if device.type != self._runtime.device_type:
            raise LayoutError(f"pages on {device}; the kernel runs on {self._runtime.device_type}")
        bases = [view.data_ptr() for view in pages.views]
        self._bases = torch.tensor(bases, dtype=torch.int64, device=device)
        self._aligned = _alignment(pages, bases)

    def _start(
        self,
        slots: NDArray[np.int32],
        where: NDArray[np.uint64],
        layers: range,
        heads: range,
        out: bool,
    ) -> None:
        plan = self._plan(slots.shape[1], layers, heads)
        kernel, vector = self._kernel(where, out)
        elements = len(heads) * len(layers) * 2 * self.format.block_tokens * self.pages.shape[3]
        many = min(LIMIT // slots.shape[1], max(1, MAX_ELEMENTS // elements))
        for first in range(0, len(where), many):
            part = slots[first : first + many]
            plan["blocks"] = len(part)
            plan["runs"][: part.size] = part.ravel()
            plan["buffers"][: len(part)] = where[first : first + many]
            pieces = len(part) * len(heads) * len(layers) * 2
            if out and self.format.scaled:
                wanted = pieces
            else:
                wanted = -(-len(part) * elements // (vector * THREADS * UNROLL))
            grid = (min(self._ctas, wanted),)
            self._runtime.launch(SOURCE, kernel, grid, (THREADS,), [cast(np.void, plan[()])])

    def _plan(self, runs: int, layers: range, heads: range) -> NDArray[np.void]:
        """All of a plan but its blocks."""
        keys, values = (steps(view) for view in self.pages.views[:2])
        _, _, page_tokens, head_dim = self.pages.shape
        plan = np.zeros((), PLAN)
        plan["bases"] = address(self._bases)
        plan["block_stride"], plan["head_stride"] = keys[:2]
        plan["token_strides"] = keys[2], values[2]
        plan["element_strides"] = keys[3], values[3]
        plan["head_bytes"], plan["scale_offset"] = self.format.head_bytes, self.format.scale_offset
        plan["page_tokens"], plan["head_dim"] = page_tokens, head_dim
        plan["block_tokens"] = self.format.block_tokens
        plan["run_tokens"] = self.format.block_tokens // runs
        plan["layers"] = self.pages.layers
        plan["first_layer"], plan["layer_count"] = layers.start, len(layers)
        plan["first_head"], plan["heads"] = heads.start, len(heads)
        return plan

    def _kernel(self, where: NDArray[np.uint64], out: bool) -> tuple[str, int]:
        """The kernel for buffers at these addresses, and how many elements a thread moves."""
        page, buffer = self.pages.views[0].dtype, self.format.dtype
        aligned = int(np.bitwise_or.reduce(where))
        widest = 16 // max(page.itemsize, buffer.itemsize)
        # A conversion has two kernels: one for 16 bytes of the wider type, one for anything.
        choices = (16, 8, 4, 2) if page == buffer else (widest,)
        vector = next((v for v in choices if v <= widest and self._fits(v, aligned)), 1)
        way = "true" if out else "false"
        if page == buffer:
            return f"copy_pages<{_BITS[page.itemsize]}, {vector}, {way}>", vector
        types = f"{_TYPES[page]}, {_TYPES[buffer]}, {vector}"
        if out and self.format.scaled:
            return f"quantise_pages<{types}>", vector
        scaled = "true" if self.format.scaled else "false"
        return f"convert_pages<{types}, {way}, {scaled}>", vector

    def _fits(self, vector: int, aligned: int) -> bool:
        """Whether every vector lies at a multiple of its size, in pages and in buffers.

        `aligned` is of buffers. Heads in them are: whole rows of pages, and scales in eights.
        """
        page, buffer = self.pages.views[0].itemsize, self.format.dtype.itemsize
        return not (self._aligned % (vector * page) or aligned % (vector * buffer))


def _alignment(pages: PagedTensors, bases: Sequence[int]) -> int:
    """A number whose lowest set bit is the alignment in bytes that every row of pages has."""
    size = pages.views[0].itemsize
    keys, values = (steps(view) for view in pages.views[:2])
    if keys[3] != 1 or values[3] != 1:
        return size
    rows = (step * size for step in (*keys[:3], values[2], pages.shape[3]))
    return int(np.bitwise_or.reduce(np.array([*bases, *rows])))

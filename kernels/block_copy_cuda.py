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
from torch import Tensor

from kvstore.errors import LayoutError
from kvstore.kernels.cuda_module import Runtime, address, runtime_of
from kvstore.kernels.paged_tensors import PagedTensors, steps

SOURCE = "block_copy.cu"
LIMIT = 256  # as in the source: blocks, and runs, of one launch
THREADS = 256
UNROLL = 4
# Enough threads to keep the bus busy, and few enough to leave the device to the model.
BUS_CTAS = 32
MAX_ELEMENTS = (1 << 31) - 1  # of one launch, which counts in 32 bits

Buffer = memoryview | Tensor
# Buffers, or where they begin, as `addresses` gives it: for who copies to or from them again.
Buffers = Sequence[Buffer] | NDArray[np.uint64]

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
_WIDE = (torch.float32, torch.bfloat16, torch.float16)
_NARROW = (torch.float8_e4m3fn, torch.int8)
SCALE_BYTES = 4


class BlockFormat:
    """What buffers hold: canonical blocks of `block_tokens` tokens, elements of `dtype`.

    Buffers hold a range of heads, one after another. With the pages' own dtype they hold the
    pages' bits; another floating dtype is rounded to. Pages of 16 or 32 bits are quantised to
    int8 or float8_e4m3fn: a float32 scale for each head, layer and K or V of a block, and a
    head's scales [layer][K, V] follow its elements, so that heads stay contiguous.
    """

    def __init__(self, pages: PagedTensors, block_tokens: int, dtype: torch.dtype) -> None:
        """Raises LayoutError for a conversion that there is not."""
        own = pages.views[0].dtype
        self.scaled = dtype in _NARROW and own in _WIDE
        if dtype != own and not self.scaled and not {dtype, own} <= {*_WIDE}:
            raise LayoutError(f"pages of {own} cannot be kept as {dtype}")
        if not 1 <= block_tokens <= LIMIT:
            raise LayoutError(f"blocks of {block_tokens} tokens; there may be 1 to {LIMIT}")
        self.block_tokens, self.dtype = block_tokens, dtype
        pieces, head_dim = len(pages.views), pages.shape[3]
        self.scale_offset = pieces * block_tokens * head_dim * dtype.itemsize
        self.head_bytes = self.scale_offset + (pieces * SCALE_BYTES if self.scaled else 0)


class KernelCopies:
    """Copies by a kernel, on torch's current stream. Nothing here waits for the device.

    The caller keeps pages and buffers alive, and leaves alone what is read or written, until
    the stream has come to the end of a copy. Any thread may call it, one at a time.
    """

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
        self.pages = pages
        self.format = BlockFormat(pages, block_tokens, dtype or pages.views[0].dtype)
        self._runtime = runtime or runtime_of(pages.views[0])
        self._ctas = ctas
        device = pages.views[0].device
        if device.type != self._runtime.device_type:
            raise LayoutError(f"pages on {device}; the kernel runs on {self._runtime.device_type}")
        bases = [view.data_ptr() for view in pages.views]
        self._bases = torch.tensor(bases, dtype=torch.int64, device=device)
        self._aligned = _alignment(pages, bases)

    def copy_out(
        self,
        runs: Sequence[int],
        buffers: Buffers,
        *,
        layers: range | None = None,
        heads: range | None = None,
    ) -> None:
        """Write one block to each buffer, all its tokens; of `layers` and `heads` if given.

        Tokens come in runs of equal length, as many for every buffer, each within one page;
        `runs` are their first slots, `page * page_tokens + offset`. A buffer holds all layers
        of the heads, and is pinned host memory or on the device. Raises LayoutError.
        """
        self._copy(runs, buffers, layers, heads, out=True)

    def copy_in(
        self,
        runs: Sequence[int],
        buffers: Buffers,
        *,
        layers: range | None = None,
        heads: range | None = None,
    ) -> None:
        """Fill pages from buffers: the inverse of `copy_out`. Negative runs are left out."""
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
        slots = checked_runs(runs, len(buffers), self.pages, self.format.block_tokens, out)
        where = addresses(buffers, len(heads) * self.format.head_bytes, self.pages, out)
        plan = self._plan(slots.shape[1], layers, heads)
        kernel, vector = self._kernel(where, out)
        elements = len(heads) * len(layers) * 2 * self.format.block_tokens * self.pages.shape[3]
        many = min(LIMIT // slots.shape[1], max(1, MAX_ELEMENTS // elements))
        for first in range(0, len(buffers), many):
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


def part_of(wanted: range | None, count: int, what: str) -> range:
    """`wanted`, or all. Raises LayoutError for what is not a part of them."""
    wanted = range(count) if wanted is None else wanted
    if wanted.step != 1 or not 0 <= wanted.start < wanted.stop <= count:
        raise LayoutError(f"{what} {wanted} of {count}")
    return wanted


def checked_runs(
    runs: Sequence[int], buffers: int, pages: PagedTensors, block_tokens: int, out: bool
) -> NDArray[np.int32]:
    """`runs` as [buffers, runs a buffer]. Raises LayoutError for runs not within one page."""
    slots = np.asarray(runs, np.int64)
    blocks, _, page_tokens, _ = pages.shape
    each, rest = divmod(len(slots), buffers)
    if rest or not each or block_tokens % each:
        raise LayoutError(f"{len(slots)} runs for {buffers} blocks of {block_tokens} tokens")
    if out or len(slots) == 0:
        low, used = 0, slots
    else:
        low, used = -1, slots[slots >= 0]
    outside = slots.min() < low or slots.max() >= blocks * page_tokens
    if outside or (used % page_tokens + block_tokens // each > page_tokens).any():
        raise LayoutError(
            f"runs of {block_tokens // each} tokens do not lie within {blocks} pages "
            f"of {page_tokens}: {list(runs)[:8]}"
        )
    return slots.astype(np.int32).reshape(buffers, each)


def addresses(buffers: Buffers, nbytes: int, pages: PagedTensors, out: bool) -> NDArray[np.uint64]:
    """Where each buffer begins. Raises LayoutError unless it has `nbytes` and can be used."""
    if isinstance(buffers, np.ndarray):
        return buffers
    device = pages.views[0].device
    where = np.empty(len(buffers), np.uint64)
    for number, buffer in enumerate(buffers):
        if isinstance(buffer, Tensor):
            usable = buffer.is_contiguous() and (buffer.device == device or buffer.is_pinned())
            size = buffer.numel() * buffer.itemsize
        else:
            usable, size = buffer.c_contiguous and not (out and buffer.readonly), buffer.nbytes
        if not usable or size != nbytes:
            raise LayoutError(
                f"buffer {number} of {size} bytes is not {nbytes} contiguous bytes that {device} "
                f"can {'write' if out else 'read'}"
            )
        where[number] = (
            buffer.data_ptr()
            if isinstance(buffer, Tensor)
            else np.frombuffer(buffer, np.uint8).ctypes.data
        )
    if (where % SCALE_BYTES).any():
        raise LayoutError(f"buffers must begin at multiples of {SCALE_BYTES} bytes")
    return where

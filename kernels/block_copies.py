"""Copies of blocks between an engine's pages and buffers: what every way of making them checks.

The ways are `block_copy_cuda.py`, by a kernel, and `block_copy_dma.py`, by the copy engines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.errors import LayoutError
from kvstore.kernels.cuda_module import Runtime, runtime_of
from kvstore.kernels.paged_tensors import PagedTensors

LIMIT = 256  # runs of one launch, as in csrc/block_copy.cu; a block may be as many as its tokens
SCALE_BYTES = 4
_WIDE = (torch.float32, torch.bfloat16, torch.float16)
_NARROW = (torch.float8_e4m3fn, torch.int8)

Buffer = memoryview | Tensor
# Buffers, or where they begin, as `addresses` gives it: for who copies to or from them again.
Buffers = Sequence[Buffer] | NDArray[np.uint64]


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


class BlockCopies(ABC):
    """One way of copying, on torch's current stream. Nothing here waits for the device.

    The caller keeps pages and buffers alive, and leaves alone what is read or written, until
    the stream has come to the end of a copy. Any thread may call it, one at a time.
    """

    def __init__(self, pages: PagedTensors, kept: BlockFormat, runtime: Runtime | None) -> None:
        """`runtime` None: that of the pages' device. Raises KernelError without a device."""
        self.pages = pages
        self.format = kept
        self._runtime = runtime or runtime_of(pages.views[0])

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
        layers = _part_of(layers, self.pages.layers, "layers")
        heads = _part_of(heads, self.pages.shape[1], "heads")
        slots = _checked_runs(runs, len(buffers), self.pages, self.format.block_tokens, out)
        where = addresses(buffers, len(heads) * self.format.head_bytes, self.pages, out)
        self._start(slots, where, layers, heads, out)

    @abstractmethod
    def _start(
        self,
        slots: NDArray[np.int32],
        where: NDArray[np.uint64],
        layers: range,
        heads: range,
        out: bool,
    ) -> None:
        """Copy runs that begin at `slots` [buffers, runs a buffer] to or from `where` they go."""


def _part_of(wanted: range | None, count: int, what: str) -> range:
    """`wanted`, or all. Raises LayoutError for what is not a part of them."""
    wanted = range(count) if wanted is None else wanted
    if wanted.step != 1 or not 0 <= wanted.start < wanted.stop <= count:
        raise LayoutError(f"{what} {wanted} of {count}")
    return wanted


def _checked_runs(
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

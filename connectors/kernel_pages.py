"""Pages in a CUDA device's memory: read and written in place by kernels, beside the engine.

The kernels reach the store's memory by themselves where it is pinned; what is not goes by way
of memory that is. docs/adr/0041-pages-on-gpus.md has the reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from math import gcd
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.connectors.convert import Pages
from kvstore.connectors.page_layout import PageLayout
from kvstore.connectors.page_views import page_views
from kvstore.kernels.block_copies import Buffer
from kvstore.kernels.block_copy_cuda import KernelCopies
from kvstore.kernels.cuda_module import Runtime, runtime_of
from kvstore.kernels.paged_tensors import PagedTensors
from kvstore.kernels.pinned_memory import PINNED, PinnedMemory
from kvstore.layout import Shard
from kvstore.tiers.hbm_copies import CopyEvent, Gates
from kvstore.tiers.hbm_cuda import CudaEvent
from kvstore.tiers.hbm_staging import STAGED_BYTES, Staging

# How `KernelCopies.copy_out` and `copy_in` are called here.
Way = Callable[..., None]


class Stream(Protocol):
    """A queue of the device's for copies, beside those on which an engine computes."""

    def computed(self) -> object:
        """A mark behind all that the calling thread has told the device so far."""
        ...

    def run(self, start: Callable[[], None], after: object) -> CopyEvent:
        """Do what `start` starts after that mark; None: after all that the device was told.

        Where `start` raises, nothing of it is under way any more.
        """
        ...


class CopyingStream:
    """A stream of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        stream: Callable[..., Any] = torch.cuda.Stream
        self._device = device
        self._stream = stream(device)

    def computed(self) -> object:
        return torch.cuda.current_stream(self._device).record_event()

    def run(self, start: Callable[[], None], after: Any) -> CopyEvent:
        if after is None:
            torch.cuda.synchronize(self._device)
        else:
            self._stream.wait_event(after)
        # Who waits sleeps: a thread beside the engine's has no processor to spend.
        event: Callable[..., Any] = torch.cuda.Event
        with torch.cuda.stream(self._stream):
            try:
                start()
            except BaseException:
                self._stream.synchronize()  # the memory of what was started will be let go of
                raise
            return CudaEvent(self._stream.record_event(event(blocking=True)), self._device)


class KernelPages(Pages):
    """As `Pages`, for tensors on a CUDA device: any thread may copy, and is done on return.

    Copies in one direction are made one after the other. Each comes after all that the device
    has been told; those of what `follow` gives, after what it had been told then.
    """

    def __init__(
        self,
        layout: PageLayout,
        tensors: Sequence[Tensor],
        *,
        runtime: Runtime | None = None,
        stream: Callable[[torch.device], Stream] = CopyingStream,
        pinned: PinnedMemory = PINNED,
    ) -> None:
        """Raises LayoutError for tensors that are not as `layout` says, or on several devices,
        and KernelError for a device whose kernels are not known.
        """
        self.layout = layout
        pages = page_views(layout, tensors)
        runtime = runtime or runtime_of(pages.views[0])
        device = pages.views[0].device
        self._out = _Lane(pages, runtime, stream(device), pinned)
        self._in = _Lane(pages, runtime, stream(device), pinned)
        self._after: object = None

    def follow(self) -> KernelPages:
        followed = copy(self)
        followed._after = self._out.stream.computed()
        return followed

    def copy_out(
        self, table: Sequence[int], first: int, views: Sequence[memoryview], block_tokens: int
    ) -> None:
        tokens = range(first, first + len(views) * block_tokens)
        if tokens:
            used = self._used(table, tokens.start, tokens.stop)
            runs = self._runs(used, first, len(views), block_tokens, tokens)
            self._out.copy_out(runs, views, block_tokens, self._after)

    def copy_in(
        self,
        table: Sequence[int],
        first: int,
        views: Sequence[memoryview],
        block_tokens: int,
        shard: Shard,
        wanted: range,
    ) -> None:
        held = self.layout.held
        low, high = max(shard.start, held.start), min(shard.stop, held.stop)
        begin = max(wanted.start, first)
        end = min(wanted.stop, first + len(views) * block_tokens)
        if low >= high or begin >= end:
            return
        used = self._used(table, begin, end)
        runs = self._runs(used, first, len(views), block_tokens, range(begin, end))
        head_bytes = self.layout.block_layout(block_tokens).head_bytes
        part = slice((low - shard.start) * head_bytes, (high - shard.start) * head_bytes)
        heads = range(low - held.start, high - held.start)
        parts = [view[part] for view in views]
        self._in.copy_in(runs, parts, block_tokens, heads, self._after)

    def _runs(
        self, used: dict[int, int], first: int, blocks: int, block_tokens: int, wanted: range
    ) -> NDArray[np.int64]:
        """First slots of runs of tokens, [blocks, runs in each]; negative of what is not wanted.

        As few as there can be of equal length, so that each lies in one page and one block.
        """
        size = self.layout.block_tokens
        length = gcd(size, block_tokens, first, wanted.start, wanted.stop)
        tokens = np.arange(first, first + blocks * block_tokens, length)
        slots = np.full(len(tokens), -1)
        inside = (tokens >= wanted.start) & (tokens < wanted.stop)
        places, offsets = np.divmod(tokens[inside], size)
        slots[inside] = np.array([used[place] for place in places.tolist()]) * size + offsets
        return slots.reshape(blocks, -1)


class _Lane:
    """Copies in one direction, of blocks of any size."""

    def __init__(
        self, pages: PagedTensors, runtime: Runtime, stream: Stream, pinned: PinnedMemory
    ) -> None:
        self.stream = stream
        self._pages = pages
        self._device = pages.views[0].device
        self._runtime = runtime
        self._pinned = pinned
        self._lock = Lock()
        self._copies: dict[int, KernelCopies] = {}  # by the block's tokens

    def copy_out(
        self,
        runs: NDArray[np.int64],
        views: Sequence[memoryview],
        block_tokens: int,
        after: object,
    ) -> None:
        with self._lock:
            start = partial(self._start, self._of(block_tokens).copy_out, runs, None, after)
            numbers = range(len(views))
            if self._pinned.holds(views, self._device):
                event = start(numbers, views)[-1]
            else:
                event = self._staging(views).copy_out(numbers, views, start)
            event.wait()

    def copy_in(
        self,
        runs: NDArray[np.int64],
        views: Sequence[memoryview],
        block_tokens: int,
        heads: range,
        after: object,
    ) -> None:
        with self._lock:
            start = partial(self._start, self._of(block_tokens).copy_in, runs, heads, after)
            numbers = range(len(views))
            if self._pinned.holds(views, self._device):
                event = start(numbers, views)[-1]
            else:
                event = self._staging(views).copy_in(numbers, views, start)[-1]
            event.wait()

    def _start(
        self,
        way: Way,
        runs: NDArray[np.int64],
        heads: range | None,
        after: object,
        numbers: Sequence[int],
        buffers: Sequence[Buffer],
    ) -> Gates:
        """Copy blocks `numbers` of `runs` to or from the buffers."""
        own = runs[list(numbers)].ravel().tolist()
        return [self.stream.run(partial(way, own, buffers, heads=heads), after)]

    def _of(self, block_tokens: int) -> KernelCopies:
        copies = self._copies.get(block_tokens)
        if copies is None:
            copies = KernelCopies(self._pages, block_tokens, runtime=self._runtime)
            self._copies[block_tokens] = copies
        return copies

    def _staging(self, views: Sequence[memoryview]) -> Staging:
        """As much memory as these need, for this copy alone; torch keeps it for the next."""
        each = views[0].nbytes
        return Staging(each, self._device, min(STAGED_BYTES, len(views) * each))

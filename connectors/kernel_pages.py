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
from kvstore.tiers.hbm_cuda import CudaStream, new_event
from kvstore.tiers.hbm_staging import STAGED_BYTES, Staging, Start

# A verb of `KernelCopies`, and the one of `Staging` for what it cannot reach; both as functions.
Way = Callable[..., None]
Stage = Callable[[Staging, Sequence[int], Sequence[memoryview], Start], CopyEvent]


class Stream(Protocol):
    """A queue of the device's for copies, beside those on which an engine computes."""

    def computed(self) -> object:
        """A mark behind all that the calling thread has told the device so far."""
        ...

    def run(self, copy: Callable[[], None], after: object = None) -> CopyEvent:
        """Do what `copy` starts after that mark; None: after all that the device was told.

        Where `copy` raises, nothing of it is under way any more.
        """
        ...


class CopyingStream(CudaStream):
    """A stream of one CUDA device, for threads that know nothing of the engine's."""

    def computed(self) -> object:
        return torch.cuda.current_stream(self._device).record_event()

    def run(self, copy: Callable[[], None], after: Any = None) -> CopyEvent:
        if after is None:
            torch.cuda.synchronize(self._device)
        else:
            self._stream.wait_event(after)
        # Who waits sleeps: a thread beside the engine's has no processor to spend.
        return self._begin(copy, new_event(blocking=True))


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
            heads = range(self.layout.held.heads)
            self._out.copy(
                KernelCopies.copy_out, Staging.copy_out,
                runs, views, block_tokens, heads, self._after,
            )  # fmt: skip

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
        self._in.copy(
            KernelCopies.copy_in, _staged_in,
            runs, parts, block_tokens, heads, self._after,
        )  # fmt: skip

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

    def copy(
        self,
        way: Way,
        stage: Stage,
        runs: NDArray[np.int64],
        views: Sequence[memoryview],
        block_tokens: int,
        heads: range,
        after: object,
    ) -> None:
        """Copy one `way`, and by way of `stage` what the device cannot reach; wait for the end."""
        with self._lock:
            start = partial(self._start, partial(way, self._of(block_tokens)), runs, heads, after)
            numbers = range(len(views))
            if self._pinned.holds(views, self._device):
                (event,) = start(numbers, views)
            else:
                # As much memory as these need, for this copy alone; torch keeps it for the next.
                each = views[0].nbytes
                staging = Staging(each, self._device, min(STAGED_BYTES, len(views) * each))
                event = stage(staging, numbers, views, start)
            event.wait()

    def _start(
        self,
        way: Way,
        runs: NDArray[np.int64],
        heads: range,
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


def _staged_in(
    staging: Staging, numbers: Sequence[int], views: Sequence[memoryview], start: Start
) -> CopyEvent:
    return staging.copy_in(numbers, views, start)[-1]

"""Copies between HBM and RAM on streams of their own, while the device computes.

Two side streams, one for each direction, since the bus has both. A copy begins when what the
device was told to compute before is done, and nothing waits for it but who asks its event.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from kvstore.errors import SettingsError
from kvstore.kernels.block_copies import LIMIT, BlockCopies, Buffer, addresses
from kvstore.kernels.block_copy_cuda import KernelCopies
from kvstore.kernels.block_copy_dma import fastest, ways_of
from kvstore.kernels.paged_tensors import PagedTensors, paged, runs_of
from kvstore.kernels.pinned_memory import PINNED, PinnedMemory
from kvstore.layout import BlockLayout
from kvstore.tiers.hbm_copies import UNBOUNDED, CopyEvent, Gates
from kvstore.tiers.hbm_staging import Staging

# While others decode they may wait for so much, layer by layer: less than a millisecond.
SHARED_WAIT_BYTES = 32 << 20
# The ways of copying are measured once, with so much.
MEASURED_BYTES = 32 << 20

new_event: Callable[..., Any] = torch.cuda.Event  # which has no types


class SideStream(Protocol):
    """A queue of the device's beside the one on which it computes."""

    def run(self, copy: Callable[[], None]) -> CopyEvent:
        """Do what `copy` starts after all that was computed before. Does not wait.

        Where `copy` raises, nothing of the stream's is under way any more when this does.
        """
        ...


class CudaEvent:
    """The end of what was told to a stream."""

    def __init__(self, event: Any, device: torch.device) -> None:
        self._event = event  # torch.cuda.Event, whose methods have no types
        self._device = device

    def done(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        with torch.cuda.device(self._device):  # a thread's own may be another
            self._event.synchronize()

    def precede_compute(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class CudaStream:
    """A stream of one CUDA device, beside torch's current one."""

    def __init__(self, device: torch.device) -> None:
        stream: Callable[..., Any] = torch.cuda.Stream
        self._stream = stream(device)
        self._device = device

    def run(self, copy: Callable[[], None]) -> CopyEvent:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return self._begin(copy, new_event())

    def _begin(self, copy: Callable[[], None], end: Any) -> CopyEvent:
        """Do what `copy` starts, after what the stream waits for; `end` is recorded behind it."""
        with torch.cuda.stream(self._stream):
            try:
                copy()
            except BaseException:
                self._stream.synchronize()  # the memory of what was started will be let go of
                raise
            return CudaEvent(self._stream.record_event(end), self._device)


class CudaCopies:
    """Copies of one KV tensor's blocks to and from pinned memory. Belongs to the engine's loop.

    Memory that cannot be pinned, or is not yet, is copied by way of memory that is.
    """

    step_bytes = UNBOUNDED

    def __init__(
        self,
        pages: PagedTensors,
        layout: BlockLayout,
        copies: BlockCopies,
        by_layer: BlockCopies,
        pinned: PinnedMemory,
        outward: SideStream,
        inward: SideStream,
    ) -> None:
        """`copies` are for whole blocks, `by_layer` for single layers of many."""
        self._pages = pages
        self._layout = layout
        self._copies = copies
        self._by_layer = by_layer
        self._pinned = pinned
        self._outward = outward
        self._inward = inward
        self._device = pages.views[0].device
        self._staged_out = Staging(layout.block_bytes, self._device)
        self._staged_in = Staging(layout.block_bytes, self._device)

    @classmethod
    def over(cls, kv: Tensor, layout: BlockLayout) -> CudaCopies:
        """For a KV tensor of which no block is in use yet; measures how to copy, for a second.

        Raises SettingsError for blocks that are too large.
        """
        if layout.block_tokens > LIMIT:
            raise SettingsError(
                f"block_tokens is {layout.block_tokens}; on a CUDA device it may be {LIMIT}"
            )
        with torch.cuda.device(kv.device):
            pages = paged(kv, layout.block_tokens)
            kernel = KernelCopies(pages, layout.block_tokens)
            copies = fastest_copies(pages, layout, kernel)
            streams = CudaStream(kv.device), CudaStream(kv.device)
        # DMA of a layer would be a call for each head of each block: too many.
        return cls(pages, layout, copies, kernel, PINNED, *streams)

    def pin(self, memory: memoryview) -> bool:
        """See to it that copies from and to `memory` begin at once. Blocks, for seconds."""
        return self._pinned.pin(memory, self._device)

    def gated_bytes(self, others_run: bool) -> int:
        return SHARED_WAIT_BYTES if others_run else UNBOUNDED

    def copy_out(self, blocks: Sequence[int], views: Sequence[memoryview]) -> CopyEvent:
        if not self._pinned.holds(views, self._device):
            return self._staged_out.copy_out(blocks, views, self._start_out)
        (event,) = self._start_out(blocks, views)
        return event

    def copy_in(self, blocks: Sequence[int], views: Sequence[memoryview]) -> CopyEvent:
        (event,) = self._copy_in(self._copies, blocks, views, [range(self._layout.layers)])
        return event

    def copy_in_by_layer(self, blocks: Sequence[int], views: Sequence[memoryview]) -> Gates:
        layers = range(self._layout.layers)
        parts = [range(layer, layer + 1) for layer in layers]
        return self._copy_in(self._by_layer, blocks, views, parts)

    def _copy_in(
        self,
        copies: BlockCopies,
        blocks: Sequence[int],
        views: Sequence[memoryview],
        parts: Sequence[range],
    ) -> Gates:
        start = partial(self._start_in, copies, parts)
        if self._pinned.holds(views, self._device):
            return start(blocks, views)
        return self._staged_in.copy_in(blocks, views, start)

    def _start_out(self, blocks: Sequence[int], buffers: Sequence[Buffer]) -> Gates:
        runs = runs_of(blocks, self._layout.block_tokens)
        where = addresses(buffers, self._layout.block_bytes, self._pages, out=True)
        return [self._outward.run(partial(self._copies.copy_out, runs, where))]

    def _start_in(
        self,
        copies: BlockCopies,
        parts: Sequence[range],
        blocks: Sequence[int],
        buffers: Sequence[Buffer],
    ) -> Gates:
        runs = runs_of(blocks, self._layout.block_tokens)
        where = addresses(buffers, self._layout.block_bytes, self._pages, out=False)
        return [
            self._inward.run(partial(copies.copy_in, runs, where, layers=part)) for part in parts
        ]


def _reachable(pages: PagedTensors, nbytes: int) -> Tensor:
    on_cuda = pages.views[0].device.type == "cuda"
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_cuda)


def fastest_copies(pages: PagedTensors, layout: BlockLayout, kernel: KernelCopies) -> BlockCopies:
    """By kernel or by DMA: whichever is faster for blocks of this size on this device.

    Overwrites a few blocks with what is in them.
    """
    count = min(pages.shape[0], max(1, MEASURED_BYTES // layout.block_bytes))
    buffers = list(_reachable(pages, count * layout.block_bytes).view(count, -1))
    return fastest(ways_of(kernel), runs_of(range(count), layout.block_tokens), buffers).copies

"""The HBM tier's CUDA copies where there is no device: kernels in the emulator, simple streams."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kvstore.kernels.block_copy_cuda import KernelCopies
from kvstore.kernels.block_copy_dma import DmaCopies
from kvstore.kernels.cuda_module import Runtime
from kvstore.kernels.paged_tensors import paged
from kvstore.kernels.pinned_memory import PinnedMemory
from kvstore.layout import BlockLayout
from kvstore.tiers.hbm_copies import OVER, CopyEvent
from kvstore.tiers.hbm_cuda import CudaCopies, SideStream


class Now:
    """A stream of a device that is done when it is told."""

    def run(self, copy: Callable[[], None]) -> CopyEvent:
        copy()
        return OVER


class Later:
    """A stream that does things in order, when someone waits for them."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []
        self._done = 0

    def run(self, copy: Callable[[], None]) -> CopyEvent:
        self._waiting.append(copy)
        return _Awaited(self, self._done + len(self._waiting))

    def reach(self, number: int) -> None:
        while self._done < number:
            self._waiting.pop(0)()
            self._done += 1

    def has_reached(self, number: int) -> bool:
        return self._done >= number


class _Awaited:
    def __init__(self, stream: Later, number: int) -> None:
        self._stream, self._number = stream, number

    def done(self) -> bool:
        return self._stream.has_reached(self._number)

    def wait(self) -> None:
        self._stream.reach(self._number)

    def precede_compute(self) -> None:
        self.wait()


def at_once(work: Callable[[], object]) -> None:
    """For `PinnedMemory`: what others do aside."""
    work()


def emulated_copies(
    kv: Tensor,
    layout: BlockLayout,
    runtime: Runtime,
    pinned: PinnedMemory | None = None,
    stream: Callable[[], SideStream] = Now,
) -> CudaCopies:
    """Whole blocks by DMA, layers by the kernel. All memory counts as pinned if not said."""
    pages = paged(kv, layout.block_tokens)
    return CudaCopies(
        pages,
        layout,
        DmaCopies(pages, layout.block_tokens, runtime=runtime),
        KernelCopies(pages, layout.block_tokens, runtime=runtime),
        pinned or PinnedMemory(lambda start, nbytes, device: 0, lambda start, device: 0, at_once),
        stream(),
        stream(),
    )

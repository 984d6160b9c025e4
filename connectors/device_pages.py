"""Pages in any device's memory: read and written by way of this process's own memory.

Whole pages cross the bus, gathered on the device first, so that it is one copy a tensor; the
conversion is then that of any pages. Slower than `KernelPages`, which need CUDA and CuPy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.connectors.convert import Pages, shaped_bits
from kvstore.connectors.page_layout import PageLayout
from kvstore.connectors.page_views import page_views
from kvstore.errors import KernelError, LayoutError
from kvstore.layout import Shard

_RAW = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


def pages_of(layout: PageLayout, tensors: Sequence[Tensor | NDArray[Any]]) -> Pages:
    """What knows the tensors' device: `Pages`, `KernelPages`, or `DevicePages` for all others.

    Raises LayoutError.
    """
    elsewhere = [t for t in tensors if isinstance(t, Tensor) and t.device.type != "cpu"]
    if not elsewhere:
        return Pages(layout, tensors)
    on_cuda = len(elsewhere) == len(tensors) and all(t.device.type == "cuda" for t in elsewhere)
    if on_cuda and find_spec("cupy") is not None:
        from kvstore.connectors.kernel_pages import KernelPages

        with suppress(KernelError):  # an old device
            return KernelPages(layout, elsewhere)
    return DevicePages(layout, tensors)


class DevicePages(Pages):
    """As `Pages`, for tensors on any one device.

    Waits for what the device has been told to do before it reads, and for its own copies before
    it returns: a thread beside the engine's needs no stream of its own to be right.
    """

    def __init__(self, layout: PageLayout, tensors: Sequence[Tensor | NDArray[Any]]) -> None:
        if len(tensors) != layout.tensors:
            raise LayoutError(f"{len(tensors)} tensors, where the layout has {layout.tensors}")
        self.layout = layout
        self._views = [shaped_bits(layout, tensor) for tensor in tensors]
        devices = {view.device for view in self._views}
        if len(devices) != 1 or devices == {torch.device("meta")}:
            raise LayoutError(f"pages on {devices}; all must be on one device")
        (self._device,) = devices
        self._axis = layout.order.index("B")
        self._parts = page_views(layout, tensors).views

    def copy_out(
        self, table: Sequence[int], first: int, views: Sequence[memoryview], block_tokens: int
    ) -> None:
        used = self._used(table, first, first + len(views) * block_tokens)
        if used:
            here, staged, _ = self._fetched(used)
            staged.copy_out(here, first, views, block_tokens)

    def copy_in(
        self,
        table: Sequence[int],
        first: int,
        views: Sequence[memoryview],
        block_tokens: int,
        shard: Shard,
        wanted: range,
    ) -> None:
        begin = max(wanted.start, first)
        end = min(wanted.stop, first + len(views) * block_tokens)
        used = self._used(table, begin, max(begin, end))
        if not used:
            return
        # Read first: what is wanted of a page may be less than the blocks that it lies in.
        here, staged, copies = self._fetched(used)
        staged.copy_in(here, first, views, block_tokens, shard, wanted)
        held, size = self.layout.held, self.layout.block_tokens
        all_heads = shard.start <= held.start and held.stop <= shard.stop
        whole = [
            place
            for place in used
            if all_heads and begin <= place * size and (place + 1) * size <= end
        ]
        self._write_whole(used, whole, copies)
        # Of other pages no more than what is wanted: the engine may be writing the rest.
        heads = slice(max(0, shard.start - held.start), max(0, shard.stop - held.start))
        own = page_views(staged.layout, [_raw(copy) for copy in copies])
        for number, (place, page) in enumerate(used.items()):
            if place not in whole:
                tokens = slice(max(0, begin - place * size), end - place * size)
                for target, source in zip(self._parts, own.views, strict=True):
                    target[page, heads, tokens].copy_(source[number, heads, tokens])
        self._settle()

    def _write_whole(
        self, used: dict[int, int], places: Sequence[int], copies: Sequence[Tensor]
    ) -> None:
        first = min(used)
        pages = torch.tensor(
            [used[place] for place in places], dtype=torch.int64, device=self._device
        )
        numbers = torch.tensor([place - first for place in places], dtype=torch.int64)
        for view, copy in zip(self._views, copies, strict=True):
            chosen = copy.index_select(self._axis, numbers)
            view.index_copy_(self._axis, pages, chosen.to(self._device))

    def _fetched(self, used: dict[int, int]) -> tuple[list[int], Pages, list[Tensor]]:
        """Copies of pages: a block table of them, and they themselves, in this process's memory."""
        self._settle()
        pages = torch.tensor(list(used.values()), device=self._device)
        copies = [view.index_select(self._axis, pages).cpu() for view in self._views]
        layout = dataclasses.replace(self.layout, blocks=len(used), strides=None)
        # Places of the sequence before the first one used are asked for by nobody.
        here = [0] * min(used) + list(range(len(used)))
        return here, Pages(layout, [_raw(copy) for copy in copies]), copies

    def _settle(self) -> None:
        """Wait until the device has done all that it was told."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _raw(bits: Tensor) -> Tensor:
    """The same bits as what a layout takes for any dtype of their size."""
    return bits.view(_RAW[bits.itemsize])

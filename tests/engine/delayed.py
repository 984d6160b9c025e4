"""Copies that are made when the test says so, and that notice what must not happen meanwhile."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

import torch

from kvstore.tiers.hbm import HbmTier
from kvstore.tiers.hbm_copies import UNBOUNDED, CopyEvent, Gates, HostCopies

# For `DelayedCopies`: what may be copied layer by layer, by whether others run.
NEVER = {False: 0, True: 0}
ALWAYS = {False: UNBOUNDED, True: UNBOUNDED}


class Delayed:
    """A copy that was asked for: made by `run`, or when someone has to wait for it."""

    layers: range | None = None

    def __init__(self, copies: DelayedCopies, queue: deque[Delayed]) -> None:
        self._copies = copies
        self._queue = queue
        self._is_over = False
        queue.append(self)

    def copy(self) -> None:
        """Make the copy, if nobody has touched what it reads or writes."""
        raise NotImplementedError

    def run(self) -> None:
        """Make it, and before it those of its direction that were asked for earlier."""
        while not self._is_over:
            first = self._queue.popleft()
            first.copy()
            first._is_over = True
            self._copies.made.append(first)

    def done(self) -> bool:
        return self._is_over

    def wait(self) -> None:
        self._copies.waits += not self._is_over
        self.run()

    def precede_compute(self) -> None:
        self._copies.preceded += not self._is_over
        self.run()


class _Out(Delayed):
    def __init__(
        self, copies: DelayedCopies, blocks: Sequence[int], views: Sequence[memoryview]
    ) -> None:
        super().__init__(copies, copies.outward)
        self._blocks, self._views = list(blocks), list(views)
        self._before = [copies.content(block).clone() for block in blocks]
        for view in views:
            view[:] = b"\xa5" * len(view)  # nobody may take this for a block

    def copy(self) -> None:
        for block, before in zip(self._blocks, self._before, strict=True):
            now = self._copies.content(block)
            assert torch.equal(_bits(now), _bits(before)), f"block {block} has been reused"
        self._copies.host.copy_out(self._blocks, self._views)


class _In(Delayed):
    def __init__(
        self,
        copies: DelayedCopies,
        blocks: Sequence[int],
        views: Sequence[memoryview],
        layers: range | None,
    ) -> None:
        super().__init__(copies, copies.inward)
        self._blocks, self._views, self.layers = list(blocks), list(views), layers
        self._before = [bytes(view) for view in views]
        for block in blocks:
            copies.content(block, layers).fill_(torch.nan)  # nobody may compute with this

    def copy(self) -> None:
        for block, view, before in zip(self._blocks, self._views, self._before, strict=True):
            assert bytes(view) == before, f"what block {block} is copied from has been reused"
            content = self._copies.content(block, self.layers)
            assert content.isnan().all(), f"block {block} has been written to"
            shape = self._copies.content(block).shape
            canonical = torch.frombuffer(bytearray(view), dtype=content.dtype).view(shape)
            content.copy_(canonical if self.layers is None else canonical[:, self.layers])


class DelayedCopies:
    """A CopyStream for an HBM tier on the CPU; replaces the tier's own when it is made.

    `gated` is the answer to `gated_bytes`, by whether others run.
    """

    step_bytes = UNBOUNDED

    def __init__(self, hbm: HbmTier, gated: dict[bool, int]) -> None:
        self._gated = gated
        self._hbm = hbm
        self.host = HostCopies(hbm.kv, hbm.layout)
        self.outward: deque[Delayed] = deque()
        self.inward: deque[Delayed] = deque()
        self.made: list[Delayed] = []  # in this order
        self.waits = 0  # for copies that were not over
        self.preceded = 0  # copies that had to be over before something was computed
        hbm.copies = self

    def run_some(self, chance: random.Random) -> None:
        """A few of each direction, or none."""
        for queue in (self.outward, self.inward):
            if queue and chance.random() < 0.3:
                chance.choice(queue).run()

    def gated_bytes(self, others_run: bool) -> int:
        return self._gated[others_run]

    def content(self, block: int, layers: range | None = None) -> torch.Tensor:
        """[kv_heads, layers, 2, block_tokens, head_dim], a view."""
        tokens = self._hbm.layout.block_tokens
        part = slice(None) if layers is None else slice(layers.start, layers.stop)
        return self._hbm.kv[:, part, :, block * tokens : (block + 1) * tokens]

    def copy_out(self, blocks: Sequence[int], views: Sequence[memoryview]) -> CopyEvent:
        return _Out(self, blocks, views)

    def copy_in(self, blocks: Sequence[int], views: Sequence[memoryview]) -> CopyEvent:
        return _In(self, blocks, views, None)

    def copy_in_by_layer(self, blocks: Sequence[int], views: Sequence[memoryview]) -> Gates:
        layers = range(self._hbm.layout.layers)
        return [_In(self, blocks, views, range(layer, layer + 1)) for layer in layers]


def _bits(content: torch.Tensor) -> torch.Tensor:
    return content.contiguous().view(torch.uint8)

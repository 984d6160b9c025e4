"""Copies of blocks between HBM and RAM, which take their time while the device computes.

A copy is started and gives an event; what it reads must not change, and what it writes must
not be read, before the event is done. Who starts copies sees to that: the blocks are held
(`BlockPool.hold`), the lease or reservation stays open.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kvstore.kernels.block_copy import copy_in, copy_out
from kvstore.layout import BlockLayout

# While others decode, a few milliseconds of copying between two steps.
STEP_COPY_BYTES = 32 << 20
UNBOUNDED = sys.maxsize


class CopyEvent(Protocol):
    """The end of a copy."""

    def done(self) -> bool:
        """Whether the copy is over. Does not wait."""
        ...

    def wait(self) -> None:
        """Block until it is over."""
        ...

    def precede_compute(self) -> None:
        """What the device is told to compute from now on comes after the copy. Does not block."""
        ...


# The events of one copy that is made layer by layer.
Gates = Sequence[CopyEvent]


class CopyStream(Protocol):
    """Starts copies, of blocks of one KV tensor. Belongs to the engine's loop.

    Copies in one direction end in the order in which they were started; the two directions
    know nothing of each other. What the device was told to compute before comes before a copy.
    `views` are one block long each, in canonical layout, and stay as they are until the copy
    is over, as do the blocks.
    """

    @property
    def step_bytes(self) -> int:
        """What should be started at most between two steps while others decode."""
        ...

    def gated_bytes(self, others_run: bool) -> int:
        """How much may be copied layer by layer while all that run compute, and wait for it."""
        ...

    def copy_out(self, blocks: Sequence[int], views: Sequence[memoryview]) -> CopyEvent:
        """From HBM to `views`, which are writable."""
        ...

    def copy_in(self, blocks: Sequence[int], views: Sequence[memoryview]) -> CopyEvent:
        """From `views` to HBM."""
        ...

    def copy_in_by_layer(self, blocks: Sequence[int], views: Sequence[memoryview]) -> Gates:
        """As `copy_in`, one layer of all blocks after another; an event for each."""
        ...


class _Over:
    """The event of a copy that was over when it began to exist."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def precede_compute(self) -> None:
        pass


OVER = _Over()


class HostCopies:
    """Copies by the calling thread, over when they return: for a KV tensor in plain memory."""

    step_bytes = STEP_COPY_BYTES

    def __init__(self, kv: Tensor, layout: BlockLayout) -> None:
        self._kv = kv
        self._layout = layout

    def gated_bytes(self, others_run: bool) -> int:
        return 0  # nothing would be computed meanwhile

    def copy_out(self, blocks: Sequence[int], views: Sequence[memoryview]) -> CopyEvent:
        copy_out(self._kv, blocks, views, self._layout.block_tokens)
        return OVER

    def copy_in(self, blocks: Sequence[int], views: Sequence[memoryview]) -> CopyEvent:
        copy_in(self._kv, views, blocks, self._layout.block_tokens)
        return OVER

    def copy_in_by_layer(self, blocks: Sequence[int], views: Sequence[memoryview]) -> Gates:
        return [self.copy_in(blocks, views)] * self._layout.layers

"""Pinned memory by way of which blocks are copied whose own memory the device cannot reach.

Blocks of a daemon elsewhere, and of an arena that is not pinned yet. The device's part of a copy
takes its time as any does; a copy out is brought on by who asks whether it is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvstore.tiers.hbm_copies import CopyEvent, Gates

STAGED_BYTES = 256 << 20
# Start copying these blocks to or from that memory.
Start = Callable[[Sequence[int], Sequence[Tensor]], Gates]


@dataclass(eq=False, slots=True)
class _Part:
    """Blocks that go by way of `slots` at once."""

    event: CopyEvent  # of the device's copy
    slots: list[int]
    rest: Sequence[tuple[memoryview, Tensor]]  # to be filled when it is over, and from what
    is_over: bool = False


class Staging:
    """For copies in one direction. Belongs to the engine's loop.

    Its memory is taken when it is first needed, once. A copy waits for the oldest ones where it
    finds too little of it, and is made in parts where it needs more than there is.
    """

    def __init__(
        self, block_bytes: int, device: torch.device, capacity_bytes: int = STAGED_BYTES
    ) -> None:
        """`device` is where the blocks come from or go to."""
        self._shape = max(1, capacity_bytes // block_bytes), block_bytes
        self._is_cuda = device.type == "cuda"
        self._memory: Tensor | None = None  # [slots, block_bytes]
        self._free = list(range(self._shape[0]))
        self._parts: deque[_Part] = deque()  # oldest first

    def copy_out(
        self, blocks: Sequence[int], views: Sequence[memoryview], start: Start
    ) -> CopyEvent:
        """From `blocks`, by the copies that `start` starts; at least one. Over when `views` are
        filled, which is when the event has been asked or waited for.
        """
        for place in self._places(len(blocks)):
            gates = self._through(blocks[place], views[place], start, out=True)
        return _Landing(self, self._parts[-1], gates[-1])

    def copy_in(self, blocks: Sequence[int], views: Sequence[memoryview], start: Start) -> Gates:
        """To `blocks`; `views` have been read when it returns. The events are `start`'s."""
        for place in self._places(len(blocks)):
            gates = self._through(blocks[place], views[place], start, out=False)
        return gates  # those of earlier parts come before

    def finish(self) -> None:
        """Bring on what the device is through with."""
        while self._parts and self._parts[0].event.done():
            self.finish_oldest()

    def finish_oldest(self) -> None:
        """Wait for it. Where that raises it is not over, and never will be."""
        part = self._parts[0]
        part.event.wait()
        for view, content in part.rest:
            view[:] = content.numpy().data
        self._parts.popleft()
        self._free += part.slots
        part.is_over = True

    def _places(self, count: int) -> Iterator[slice]:
        most = self._shape[0]
        return (slice(first, first + most) for first in range(0, count, most))

    def _through(
        self, blocks: Sequence[int], views: Sequence[memoryview], start: Start, out: bool
    ) -> Gates:
        self.finish()
        while len(self._free) < len(blocks):
            self.finish_oldest()
        slots = [self._free.pop() for _ in blocks]
        try:
            staged = [self._rows[slot] for slot in slots]
            if not out:
                for content, view in zip(staged, views, strict=True):
                    content.numpy()[:] = np.frombuffer(view, np.uint8)
            gates = start(blocks, staged)
        except BaseException:
            self._free += slots  # a stream that fails has nothing under way any more
            raise
        rest = list(zip(views, staged, strict=True)) if out else ()
        self._parts.append(_Part(gates[-1], slots, rest))
        return gates

    @property
    def _rows(self) -> Tensor:
        if self._memory is None:
            self._memory = torch.empty(self._shape, dtype=torch.uint8, pin_memory=self._is_cuda)
        return self._memory


class _Landing:
    """The event of a copy out: over when its last part is where it belongs."""

    def __init__(self, staging: Staging, last: _Part, copied: CopyEvent) -> None:
        self._staging, self._last, self._copied = staging, last, copied

    def done(self) -> bool:
        self._staging.finish()
        return self._last.is_over

    def wait(self) -> None:
        while not self._last.is_over:
            self._staging.finish_oldest()

    def precede_compute(self) -> None:
        self._copied.precede_compute()

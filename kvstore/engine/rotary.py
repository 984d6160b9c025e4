"""Applying rotary position embedding to queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.engine.rope import Rope

# The tables grow by doubling from here, as long as the longest sequence needs it.
FIRST_POSITIONS = 1024


class Rotary:
    """Cosines and sines of every position so far, and the rotation with them, in float32.

    Written so that each element goes through single, exactly rounded operations: its
    result is the same wherever in a batch it stands.
    """

    def __init__(self, rope: Rope, device: torch.device) -> None:
        self._rope = rope
        self._device = device
        self._cos = self._sin = torch.empty(0, device=device)

    def at(self, positions: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine for `rotate`, [T, 1, dim] each; positions are below `limit`."""
        if limit > len(self._cos):
            size = max(FIRST_POSITIONS, 1 << (limit - 1).bit_length())
            cos, sin = self._rope.tables(size)
            # The first half of a head takes minus the second times sin: the sign goes here.
            self._cos = torch.cat([cos, cos], -1).to(self._device)
            self._sin = torch.cat([-sin, sin], -1).to(self._device)
        return self._cos[positions][:, None], self._sin[positions][:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, dim] float32 in place; returns it."""
    swapped = x.roll(x.shape[-1] // 2, -1)
    return x.mul_(cos).add_(swapped.mul_(sin))

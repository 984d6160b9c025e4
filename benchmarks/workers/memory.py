"""What a peer's worker puts, and where it gets it to. Needs numpy, and nothing of ours."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray


class Memory:
    """`count` random blocks of `block_bytes`, and as much room, both on whole pages.

    Each round puts the same blocks under other names: block i is then
    `source[(i + round) % count]`, so that what an earlier round left is told from this one's.
    """

    def __init__(self, block_bytes: int, count: int) -> None:
        self.block_bytes, self.count = block_bytes, count
        self.source = _pages(block_bytes, count)
        self.target = _pages(block_bytes, count)
        generator = np.random.default_rng(0)
        for block in self.source:
            block[:] = np.frombuffer(generator.bytes(block_bytes), np.uint8)
        self._round = 0

    @property
    def order(self) -> list[int]:
        """Which block of `source` each name stands for in this round."""
        return [(i + self._round) % self.count for i in range(self.count)]

    def next_round(self) -> int:
        self._round += 1
        return self._round

    def forget(self) -> None:
        """Before a get: nothing that was got before is there."""
        self.target[:] = 0

    def check(self) -> None:
        """After a get. Raises unless every block is the one that was put in this round."""
        for got, i in zip(self.target, self.order, strict=True):
            if not np.array_equal(got, self.source[i]):
                raise RuntimeError("what came out is not what went in")


def _pages(block_bytes: int, count: int) -> NDArray[np.uint8]:
    made = np.frombuffer(mmap.mmap(-1, block_bytes * count), np.uint8)
    made[:] = 0
    return made.reshape(count, block_bytes)

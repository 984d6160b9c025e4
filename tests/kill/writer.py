"""A process that writes one file over and over, with much in flight: `... writer FILE`."""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
from itertools import count
from pathlib import Path

from kvstore.tiers.blockfile import Block, BlockFile
from kvstore.tiers.driver import open_driver

PIECE_BYTES, PIECES = 4 << 20, 32


def hold(path: Path) -> None:
    """Lock the very descriptor that requests are made on: they keep the lock, too."""
    for descriptor in os.listdir("/proc/self/fd"):
        if os.path.realpath(f"/proc/self/fd/{descriptor}") == str(path):
            fcntl.flock(int(descriptor), fcntl.LOCK_EX)


def main(path: Path) -> None:
    file = BlockFile(path, open_driver("auto"))
    file.resize(PIECES * PIECE_BYTES)
    hold(path)
    buffer = memoryview(mmap.mmap(-1, PIECE_BYTES))
    blocks = [Block(number * PIECE_BYTES, buffer) for number in range(PIECES)]
    for turn in count(1):
        buffer[:] = bytes([turn % 256]) * PIECE_BYTES
        print("writing", flush=True)
        file.write(blocks, lambda number, error: None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""One preallocated file of blocks, past the page cache where the file system lets us."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from kvstore.allocator import ALIGN_BYTES, align_up
from kvstore.tiers.driver import Driver, Op, Request, address

log = logging.getLogger(__name__)

MERGE_BYTES = 1 << 20  # neighbours are moved in one request up to this length
MERGE_BUFFERS = 256
BOUNCE_BYTES = 32 << 20  # memory lent to one batch of buffers that are not aligned
PASSING_ERRORS = frozenset({errno.ENOMEM, errno.EAGAIN, errno.EINTR})  # others: the medium's


class Block(NamedTuple):
    """Where in the file, and the buffer to read into or write from."""

    offset: int
    buffer: memoryview


Done = Callable[[int, int], None]
"""Called with the number of a block and 0, or the errno; ENODATA where the file ends."""


class BlockFile:
    """Reads and writes batches of blocks at 4 KiB-aligned offsets; a block has at most 4 GiB.

    With O_DIRECT, buffers that are aligned to 4 KiB in place and length are moved
    without a copy, all others through a bounce buffer, and such a write fills the
    last 4 KiB with zeros. Any thread may call, several at a time; all calls block.
    The driver is borrowed.
    """

    def __init__(self, path: Path, driver: Driver) -> None:
        """Opens or creates the file. Raises OSError.

        Requests that io_uring had in flight for a process that was killed go on after
        it is gone. They hold its lock on this file, so that we wait for them here, for
        milliseconds, instead of being overwritten by them.
        """
        self._driver = driver
        self._fd, self.direct = _open(path)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        except OSError:
            os.close(self._fd)
            raise

    @property
    def size_bytes(self) -> int:
        return os.fstat(self._fd).st_size

    def resize(self, nbytes: int) -> None:
        """Make the file this long, with every byte allocated. OSError, and no change, if not."""
        before = self.size_bytes
        if nbytes < before:
            os.ftruncate(self._fd, nbytes)
            return
        try:
            if nbytes:
                os.posix_fallocate(self._fd, 0, nbytes)
        except OSError:
            os.ftruncate(self._fd, before)
            raise

    def read(self, blocks: Sequence[Block], done: Done) -> None:
        """Fill every buffer; `done` runs as each is filled, while others are under way."""
        self._move(Op.READ, blocks, done)

    def write(self, blocks: Sequence[Block], done: Done) -> None:
        """Write every buffer; `done` runs as each is written, while others are under way.

        What is written survives the process, and a power cut only after `sync`.
        """
        self._move(Op.WRITE, blocks, done)

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _move(self, op: Op, blocks: Sequence[Block], done: Done) -> None:
        addresses = [address(block.buffer) for block in blocks]
        ready = [
            not self.direct or not (where | block.buffer.nbytes) % ALIGN_BYTES
            for where, block in zip(addresses, blocks, strict=True)
        ]
        if all(ready):
            self._run(op, blocks, addresses, done)
            return
        numbers = [number for number, aligned in enumerate(ready) if aligned]
        self._run(
            op,
            [blocks[number] for number in numbers],
            [addresses[number] for number in numbers],
            lambda place, error: done(numbers[place], error),
        )
        lent: list[int] = []
        lent_bytes = 0
        for number, aligned in enumerate(ready):
            if aligned:
                continue
            lent.append(number)
            lent_bytes += blocks[number].buffer.nbytes
            if lent_bytes >= BOUNCE_BYTES:
                self._bounce(op, blocks, lent, done)
                lent, lent_bytes = [], 0
        if lent:
            self._bounce(op, blocks, lent, done)

    def _bounce(self, op: Op, blocks: Sequence[Block], numbers: list[int], done: Done) -> None:
        """Move blocks through aligned memory of our own."""
        sizes = [align_up(blocks[number].buffer.nbytes) for number in numbers]
        try:
            memory = memoryview(mmap.mmap(-1, sum(sizes)))
        except OSError as error:
            for number in numbers:
                done(number, error.errno or errno.ENOMEM)
            return
        lent: list[Block] = []
        start = 0
        for number, size in zip(numbers, sizes, strict=True):
            block = blocks[number]
            aligned = memory[start : start + size]
            if op is Op.WRITE:
                aligned[: block.buffer.nbytes] = block.buffer.cast("B")
            lent.append(Block(block.offset, aligned))
            start += size

        def copied(place: int, error: int) -> None:
            buffer = blocks[numbers[place]].buffer
            if op is Op.READ and not error:
                buffer.cast("B")[:] = lent[place].buffer[: buffer.nbytes]
            done(numbers[place], error)

        self._run(op, lent, [address(block.buffer) for block in lent], copied)

    def _run(self, op: Op, blocks: Sequence[Block], addresses: Sequence[int], done: Done) -> None:
        runs = _merge(blocks)
        requests = [
            Request(
                blocks[run[0]].offset,
                [blocks[number].buffer for number in run],
                [addresses[number] for number in run],
            )
            for run in runs
        ]
        left = set(range(len(runs)))

        def moved(number: int, nbytes: int) -> None:
            if nbytes == sum(blocks[member].buffer.nbytes for member in runs[number]):
                left.discard(number)
                for member in runs[number]:
                    done(member, 0)

        try:
            self._driver.run(op, self._fd, requests, moved)
        except OSError as error:
            # Its text: a log that keeps an error keeps its frames, and their buffers.
            text = str(error)
            log.warning("%s driver: %s; moving the blocks one by one", self._driver.name, text)
        # One bad sector, or the end of the file, is not to cost its neighbours.
        for number in sorted(left):
            for member in runs[number]:
                done(member, self._move_alone(op, blocks[member]))

    def _move_alone(self, op: Op, block: Block) -> int:
        """Move one block to its end however short the steps; 0, or the errno."""
        call = os.preadv if op is Op.READ else os.pwritev
        nbytes, moved = block.buffer.nbytes, 0
        while moved < nbytes:
            try:
                step = call(self._fd, [block.buffer[moved:]], block.offset + moved)
            except OSError as error:
                return error.errno or errno.EIO
            if not step:
                return errno.ENODATA
            moved += step
        return 0


def _open(path: Path) -> tuple[int, bool]:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    fd = os.open(path, flags, 0o600)
    log.warning("%s: no O_DIRECT on this file system; I/O goes through the page cache", path)
    return fd, False


def _merge(blocks: Sequence[Block]) -> list[list[int]]:
    """Numbers of blocks in order of offset, those that one request can move together."""
    runs: list[list[int]] = []
    end = merged_bytes = -1
    for number in sorted(range(len(blocks)), key=lambda i: blocks[i].offset):
        offset, nbytes = blocks[number].offset, blocks[number].buffer.nbytes
        merged_bytes += nbytes
        if offset == end and merged_bytes <= MERGE_BYTES and len(runs[-1]) < MERGE_BUFFERS:
            runs[-1].append(number)
        else:
            runs.append([number])
            merged_bytes = nbytes
        end = offset + nbytes
    return runs

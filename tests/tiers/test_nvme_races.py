"""Verbs that meet over one block: neither fails for it, and no other block pays."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from kvstore.tier import Miss, Refusal
from kvstore.tiers.nvme import NvmeTier
from tests.tiers.subjects import (
    CAPACITY_BYTES,
    extent,
    flip_in_file,
    item,
    key,
    request,
    run,
)

PATIENCE_S = 30.0  # for what comes within milliseconds, or is broken


class WatchedLock:
    """A lock that calls `then` after it was let go of for the first time."""

    def __init__(self, lock: threading.Lock, then: Callable[[], None]) -> None:
        self._lock = lock
        self._then: Callable[[], None] | None = then

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        then, self._then = self._then, None
        self._lock.release()
        if then is not None:
            then()


def test_two_readers_find_the_same_damage(tmp_path: Path) -> None:
    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        await tier.write([item(n) for n in range(3)])
        flip_in_file(tmp_path / "slab", extent(tier, key(1))[0], 0)
        read, together = tier._slab.file.read, threading.Barrier(2)

        def read_together(blocks: object, done: object) -> None:
            read(blocks, done)  # type: ignore[arg-type]
            together.wait(PATIENCE_S)

        tier._slab.file.read = read_together  # type: ignore[method-assign]
        results = await asyncio.gather(
            tier.read([request(0), request(1)]), tier.read([request(1), request(2)])
        )
        assert [[r.miss for r in batch] for batch in results] == [
            [None, Miss.CHECKSUM],
            [Miss.CHECKSUM, None],
        ]
        assert tier.peek([key(n) for n in range(3)]) == [True, False, True]
        tier.check_invariants()
        await tier.close()

    run(body())


def test_a_block_that_is_evicted_while_it_is_deleted(tmp_path: Path) -> None:
    """Its row is another block's before the delete goes on."""

    async def body() -> None:
        nbytes = CAPACITY_BYTES // 16
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        await tier.write([item(n, nbytes) for n in range(16)])
        oldest = next(n for n in range(16) if tier.peek([key(n)]) == [True])
        loop, lock = asyncio.get_running_loop(), tier._slab.lock

        def write() -> None:
            tier._slab.lock = lock
            written = asyncio.run_coroutine_threadsafe(tier.write([item(99, nbytes)]), loop)
            assert written.result(PATIENCE_S)[0].refusal is None

        tier._slab.lock = WatchedLock(lock, write)  # type: ignore[assignment]
        assert await tier.delete([key(oldest)]) == 1
        assert tier.peek([key(oldest), key(99)]) == [False, True]
        tier.check_invariants()
        await tier.close()

    run(body())


def test_a_block_that_is_written_again_while_its_deleted_copy_is_read(tmp_path: Path) -> None:
    """It cannot be taken yet, and that is said: whoever is told that it is stored gives it up."""

    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        await tier.write([item(1)])
        loop, read = asyncio.get_running_loop(), tier._slab.file.read
        refusals: list[Refusal | None] = []

        def read_slowly(blocks: object, done: object) -> None:
            deleted = asyncio.run_coroutine_threadsafe(tier.delete([key(1)]), loop)
            assert deleted.result(PATIENCE_S) == 1
            written = asyncio.run_coroutine_threadsafe(tier.write([item(1), item(2)]), loop)
            refusals.extend(result.refusal for result in written.result(PATIENCE_S))
            read(blocks, done)  # type: ignore[arg-type]

        tier._slab.file.read = read_slowly  # type: ignore[method-assign]
        assert (await tier.read([request(1)]))[0].miss is None
        assert refusals == [Refusal.FULL, None]
        assert tier.peek([key(1), key(2)]) == [False, True]
        assert (await tier.write([item(1)]))[0].refusal is None
        assert tier.peek([key(1)]) == [True]
        tier.check_invariants()
        await tier.close()

    run(body())


def test_a_damaged_block_that_is_evicted_as_its_reader_ends(tmp_path: Path) -> None:
    """The reader takes away the block that it found damaged, and not its successor in the row."""

    async def body() -> None:
        nbytes = CAPACITY_BYTES // 16
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        await tier.write([item(n, nbytes) for n in range(16)])
        oldest = next(n for n in range(16) if tier.peek([key(n)]) == [True])
        flip_in_file(tmp_path / "slab", extent(tier, key(oldest))[0], 0)
        loop, lock = asyncio.get_running_loop(), tier._slab.lock
        read = tier._slab.file.read

        def write() -> None:
            tier._slab.lock = lock
            written = asyncio.run_coroutine_threadsafe(tier.write([item(99, nbytes)]), loop)
            assert written.result(PATIENCE_S)[0].refusal is None

        def read_and_watch(blocks: object, done: object) -> None:
            read(blocks, done)  # type: ignore[arg-type]
            tier._slab.lock = WatchedLock(lock, write)  # type: ignore[assignment]

        tier._slab.file.read = read_and_watch  # type: ignore[method-assign]
        (result,) = await tier.read([request(oldest, nbytes)])
        assert result.miss is Miss.CHECKSUM
        assert tier.peek([key(oldest), key(99)]) == [False, True]
        tier.check_invariants()
        await tier.close()

    run(body())

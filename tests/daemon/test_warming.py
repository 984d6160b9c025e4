"""The arena becomes memory behind those who reserve, and in front of nobody."""

from __future__ import annotations

import asyncio
import threading

from kvstore.daemon.warming import STEP_BYTES, Warming

PATIENCE_S = 30.0


class Slow:
    """An arena whose memory comes when the test says so."""

    fd = -1
    buffer = memoryview(b"")

    def __init__(self) -> None:
        self.populated = 0
        self.asked: list[int] = []
        self.may = threading.Semaphore(0)

    def is_populated(self, stop: int) -> bool:
        return self.populated >= stop

    def populate(self, stop: int) -> None:
        self.asked.append(stop)
        assert self.may.acquire(timeout=PATIENCE_S)
        self.populated = stop


def test_nobody_waits_and_all_of_it_comes() -> None:
    async def run() -> None:
        arena = Slow()
        warming = Warming(arena)
        warming.want(STEP_BYTES + 1)
        warming.want(10)  # is part of that
        warming.want(2 * STEP_BYTES + 5)  # wanted while the first is on its way
        assert arena.populated == 0
        arena.may.release(3)
        async with asyncio.timeout(PATIENCE_S):
            while not arena.is_populated(2 * STEP_BYTES + 5):
                await asyncio.sleep(0)
        assert arena.asked == [STEP_BYTES, 2 * STEP_BYTES, 2 * STEP_BYTES + 5]
        while warming._working is not None:
            await asyncio.sleep(0)
        warming.want(3)
        assert warming._working is None

    asyncio.run(run())


def test_it_ends_at_the_next_step() -> None:
    async def run() -> None:
        arena = Slow()
        warming = Warming(arena)
        warming.want(8 * STEP_BYTES)
        working = warming._working
        assert working is not None
        while not arena.asked:
            await asyncio.sleep(0)
        warming.close()
        arena.may.release(8)
        await asyncio.gather(working, return_exceptions=True)
        assert arena.asked == [STEP_BYTES]

    asyncio.run(run())

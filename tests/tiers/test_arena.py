"""The arena keeps what is in it while huge pages are made under it."""

from __future__ import annotations

import threading

import pytest

from kvstore.mapping import HUGE_PAGE_BYTES, STEP_BYTES
from kvstore.tiers.arena import Arena

PAGE = 4096


@pytest.mark.parametrize(
    "length",
    [PAGE, HUGE_PAGE_BYTES - PAGE, HUGE_PAGE_BYTES, 2 * STEP_BYTES, 2 * STEP_BYTES + 3 * PAGE],
)
def test_every_byte_can_be_written_and_is_kept(length: int) -> None:
    arena = Arena(length)
    assert len(arena.buffer) == length
    places = sorted({0, PAGE - 1, length // 2, length - 7, length - 1})
    for stop in (1, length // 3, length):
        for place in places:
            arena.buffer[place] = place % 251
        arena.populate(stop)
        assert [arena.buffer[place] for place in places] == [place % 251 for place in places]
    assert sum(arena.buffer[:PAGE]) == sum(place % 251 for place in places if place < PAGE)
    arena.close()


def test_memory_is_taken_as_it_is_needed() -> None:
    arena = Arena(8 * STEP_BYTES)
    before = resident_bytes()
    arena.populate(1)
    taken = resident_bytes() - before
    arena.populate(8 * STEP_BYTES)
    arena.buffer[::PAGE] = bytes(8 * STEP_BYTES // PAGE)
    assert taken <= STEP_BYTES + HUGE_PAGE_BYTES
    assert resident_bytes() - before >= 7 * STEP_BYTES
    arena.close()


def test_a_view_outlives_the_arena() -> None:
    arena = Arena(HUGE_PAGE_BYTES)
    arena.populate(PAGE)
    view = arena.buffer[:PAGE]
    view[:] = b"\x07" * PAGE
    arena.close()
    assert bytes(view) == b"\x07" * PAGE
    view.release()


def test_threads_write_while_others_populate() -> None:
    arena = Arena(4 * STEP_BYTES)
    part = len(arena.buffer) // 4

    def work(number: int) -> None:
        for place in range(number * part, (number + 1) * part, PAGE):
            arena.populate(place + 1)
            arena.buffer[place : place + PAGE] = bytes([number + 1]) * PAGE

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert (
            bytes(arena.buffer[number * part : (number + 1) * part]) == bytes([number + 1]) * part
        )
    arena.close()


def resident_bytes() -> int:
    """Shared memory of this process that is there."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssShmem"))
    return int(line.split()[1]) * 1024

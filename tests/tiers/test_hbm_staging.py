"""Blocks go by way of other memory while the device computes, however little there is of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from kvstore.tiers.hbm_copies import CopyEvent, Gates
from kvstore.tiers.hbm_staging import Staging
from tests.tiers.emulated_copies import Later

SIZE = 64
CPU = torch.device("cpu")


class Pages:
    """What a device holds: a row a block, copied on a stream of its own."""

    def __init__(self, blocks: int) -> None:
        self.rows = torch.randint(0, 256, (blocks, SIZE), dtype=torch.uint8)
        self.stream = Later()
        self.memory: set[int] = set()  # of all buffers

    def start_out(self, blocks: Sequence[int], buffers: Sequence[Tensor]) -> Gates:
        def copy() -> None:
            for block, buffer in zip(blocks, buffers, strict=True):
                buffer.copy_(self.rows[block])

        self.memory |= {buffer.data_ptr() for buffer in buffers}
        return [self.stream.run(copy)]

    def start_in(self, blocks: Sequence[int], buffers: Sequence[Tensor]) -> Gates:
        """In two parts, as if of two layers."""

        def copy(part: slice) -> None:
            for block, buffer in zip(blocks, buffers, strict=True):
                self.rows[block, part] = buffer[part]

        halves = slice(0, SIZE // 2), slice(SIZE // 2, SIZE)
        self.memory |= {buffer.data_ptr() for buffer in buffers}
        return [self.stream.run(partial(copy, half)) for half in halves]

    def bytes_of(self, blocks: Sequence[int]) -> list[bytes]:
        return [self.rows[block].numpy().tobytes() for block in blocks]


def views_of(count: int) -> list[memoryview]:
    return [memoryview(bytearray(SIZE)) for _ in range(count)]


def test_a_copy_out_is_over_when_the_device_is_through_and_not_before() -> None:
    pages, staging = Pages(8), Staging(SIZE, CPU, 4 * SIZE)
    views = views_of(3)
    event = staging.copy_out([5, 1, 6], views, pages.start_out)
    assert not event.done()
    assert bytes(views[0]) == bytes(SIZE)
    pages.stream.reach(1)
    assert bytes(views[0]) == bytes(SIZE)
    assert event.done()
    assert [bytes(view) for view in views] == pages.bytes_of([5, 1, 6])


def test_what_comes_in_has_been_read_when_it_is_started() -> None:
    pages, staging = Pages(8), Staging(SIZE, CPU, 4 * SIZE)
    views = [memoryview(bytearray([number] * SIZE)) for number in range(3)]
    gates = staging.copy_in([5, 1, 6], [view.toreadonly() for view in views], pages.start_in)
    for view in views:
        view[:] = bytes([9]) * SIZE
    assert [gate.done() for gate in gates] == [False, False]
    gates[0].precede_compute()
    assert [gate.done() for gate in gates] == [True, False]
    gates[1].wait()
    assert pages.bytes_of([5, 1, 6]) == [bytes([number]) * SIZE for number in range(3)]


def test_there_is_memory_for_as_much_as_was_said() -> None:
    """A copy waits for the oldest, and for no other; one of more blocks is made in parts."""
    pages, staging = Pages(32), Staging(SIZE, CPU, 4 * SIZE + 1)
    first_views, second_views, views = views_of(2), views_of(2), views_of(11)
    first = staging.copy_out([0, 1], first_views, pages.start_out)
    second = staging.copy_out([2, 3], second_views, pages.start_out)
    assert not first.done()
    third = staging.copy_out([4], views_of(1), pages.start_out)
    assert first.done()
    assert not second.done()
    blocks = list(range(20, 31))
    last = staging.copy_out(blocks, views, pages.start_out)
    assert third.done()
    assert not last.done()
    last.wait()
    assert [bytes(view) for view in first_views + second_views] == pages.bytes_of(range(4))
    assert [bytes(view) for view in views] == pages.bytes_of(blocks)
    assert len(pages.memory) == 4


def test_a_copy_whose_end_is_an_error_is_never_over() -> None:
    class Failed:
        def done(self) -> bool:
            return True

        def wait(self) -> None:
            raise RuntimeError("the device is lost")

        def precede_compute(self) -> None:
            raise NotImplementedError

    staging = Staging(SIZE, CPU, 4 * SIZE)
    event = staging.copy_out([0], views_of(1), lambda blocks, buffers: [Failed()])
    for ask in (event.done, event.wait, event.done):
        with pytest.raises(RuntimeError):
            ask()


def test_a_block_larger_than_all() -> None:
    pages, staging = Pages(3), Staging(SIZE, CPU, SIZE // 2)
    views = views_of(3)
    staging.copy_out([2, 0, 1], views, pages.start_out).wait()
    assert [bytes(view) for view in views] == pages.bytes_of([2, 0, 1])
    assert len(pages.memory) == 1


@pytest.mark.parametrize("way", ["out", "in"])
def test_what_cannot_be_started_takes_no_memory(way: str) -> None:
    def fail(blocks: Sequence[int], buffers: Sequence[Tensor]) -> Gates:
        raise MemoryError

    pages, staging = Pages(8), Staging(SIZE, CPU, 4 * SIZE)
    copy = staging.copy_out if way == "out" else staging.copy_in
    for _ in range(3):
        with pytest.raises(MemoryError):
            copy([0, 1, 2], views_of(3), fail)
    event = staging.copy_out(range(4), views_of(4), pages.start_out)
    assert not event.done()


@pytest.mark.parametrize("seed", range(5))
def test_any_traffic(seed: int) -> None:
    """Copies of both directions under way at once, waited for in any order or not at all."""
    chance = random.Random(seed)
    pages, out, into = Pages(40), Staging(SIZE, CPU, 12 * SIZE), Staging(SIZE, CPU, 7 * SIZE)
    expected = pages.bytes_of(range(40))  # when all that was started is over
    leaving: list[tuple[CopyEvent, list[memoryview], list[bytes]]] = []
    for _ in range(200):
        blocks = chance.sample(range(40), chance.randint(1, 9))
        if chance.random() < 0.5:
            views = views_of(len(blocks))
            event = out.copy_out(blocks, views, pages.start_out)
            leaving.append((event, views, [expected[block] for block in blocks]))
        else:
            contents = [chance.randbytes(SIZE) for _ in blocks]
            into.copy_in(blocks, [memoryview(content) for content in contents], pages.start_in)
            for block, content in zip(blocks, contents, strict=True):
                expected[block] = content
        for event, views, before in chance.sample(leaving, min(3, len(leaving))):
            if chance.random() < 0.3:
                event.wait()
                assert event.done()
            if event.done():
                assert list(map(bytes, views)) == before
    for event, views, before in leaving:
        event.wait()
        assert list(map(bytes, views)) == before

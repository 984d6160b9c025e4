"""The extent allocator against a model that knows every page by name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.allocator import ALIGN_BYTES, ExtentAllocator, align_up
from kvstore.errors import InvariantError

PAGES = 48


def runs(pages: set[int]) -> list[tuple[int, int]]:
    """Maximal runs of consecutive pages: `(first, length)`, by first."""
    found: list[tuple[int, int]] = []
    for page in sorted(pages):
        if found and sum(found[-1]) == page:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((page, 1))
    return found


def give_back(space: ExtentAllocator, extents: list[tuple[int, int]]) -> None:
    offsets, nbytes = zip(*extents, strict=True) if extents else ((), ())
    space.free(np.array(offsets, dtype=np.int64), np.array(nbytes, dtype=np.int64))


class AllocatorMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        # A capacity that is no multiple of the alignment: the rest is not given out.
        self.space = ExtentAllocator(PAGES * ALIGN_BYTES + 100)
        self.free = set(range(PAGES))
        self.held: list[tuple[int, int]] = []  # (offset, nbytes)

    @rule(nbytes=st.integers(1, 6 * ALIGN_BYTES), count=st.integers(0, 12))
    def allocate(self, nbytes: int, count: int) -> None:
        pages = align_up(nbytes) // ALIGN_BYTES
        before = runs(self.free)
        offsets = self.space.allocate(nbytes, count)
        taken: list[int] = []
        for offset in offsets:
            assert offset % ALIGN_BYTES == 0
            first = offset // ALIGN_BYTES
            taken.extend(range(first, first + pages))
        assert len(taken) == len(set(taken))
        assert set(taken) <= self.free
        fitting = [length for _, length in before if length >= pages * count]
        if count and fitting:
            # One run holds them all: they lie together, in the smallest run that does.
            assert len(offsets) == count
            assert taken == list(range(taken[0], taken[0] + pages * count))
            chosen = next(n for first, n in before if first <= taken[0] < first + n)
            assert chosen == min(fitting)
        self.free -= set(taken)
        if len(offsets) < count:
            assert all(length < pages for _, length in runs(self.free))
        self.held.extend((offset, nbytes) for offset in offsets)

    @rule(data=st.data())
    def give_some_back(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.held), unique=True)) if self.held else []
        give_back(self.space, chosen)
        for offset, nbytes in chosen:
            self.held.remove((offset, nbytes))
            first = offset // ALIGN_BYTES
            self.free.update(range(first, first + align_up(nbytes) // ALIGN_BYTES))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def giving_back_twice_in_one_batch_changes_nothing(self, data: st.DataObject) -> None:
        extent = data.draw(st.sampled_from(self.held))
        with pytest.raises(InvariantError):
            give_back(self.space, [*self.held, extent])

    @precondition(lambda self: self.free)
    @rule(data=st.data())
    def giving_back_a_free_run_raises(self, data: st.DataObject) -> None:
        first, length = data.draw(st.sampled_from(runs(self.free)))
        with pytest.raises(InvariantError):
            give_back(self.space, [(first * ALIGN_BYTES, length * ALIGN_BYTES)])

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.space.check_invariants()
        expected = [(a * ALIGN_BYTES, n * ALIGN_BYTES) for a, n in runs(self.free)]
        assert self.space.free_extents() == expected
        assert self.space.free_bytes == len(self.free) * ALIGN_BYTES
        assert self.space.used_bytes == (PAGES - len(self.free)) * ALIGN_BYTES
        assert self.space.largest_free_bytes == max((n for _, n in expected), default=0)


TestAllocator = AllocatorMachine.TestCase

# Offsets and lengths as a damaged file might have them.
odd = st.sampled_from([-ALIGN_BYTES, 1, 2**62, 2**63 - ALIGN_BYTES, 2**63 - 1, -(2**63)])
offsets = st.integers(0, PAGES).map(lambda page: page * ALIGN_BYTES) | odd
lengths = st.integers(1, 4 * ALIGN_BYTES) | st.just(0) | odd


@given(st.lists(st.tuples(offsets, lengths), max_size=30))
def test_claim_takes_what_fits_and_the_rest_is_free(extents: list[tuple[int, int]]) -> None:
    space = ExtentAllocator(PAGES * ALIGN_BYTES)
    taken = space.claim(
        np.array([offset for offset, _ in extents], dtype=np.int64),
        np.array([nbytes for _, nbytes in extents], dtype=np.int64),
    )
    used: set[int] = set()
    reach = 0
    for i in sorted(range(len(extents)), key=lambda i: extents[i][0]):
        offset, nbytes = extents[i]
        legal = offset >= 0 and offset % ALIGN_BYTES == 0 and nbytes > 0
        end = offset + align_up(nbytes)
        if not legal or end > PAGES * ALIGN_BYTES:
            assert not taken[i]
            continue
        assert taken[i] == (offset >= reach)
        reach = max(reach, end)
        if taken[i]:
            used.update(range(offset // ALIGN_BYTES, end // ALIGN_BYTES))
    space.check_invariants()
    free = set(range(PAGES)) - used
    assert space.free_extents() == [(a * ALIGN_BYTES, n * ALIGN_BYTES) for a, n in runs(free)]
    # What was claimed can be given back, and then all is free again.
    give_back(space, [extent for extent, mine in zip(extents, taken, strict=True) if mine])
    assert space.free_extents() == [(0, PAGES * ALIGN_BYTES)]


def test_claim_is_refused_once_something_was_given_out() -> None:
    space = ExtentAllocator(PAGES * ALIGN_BYTES)
    space.allocate(1, 1)
    with pytest.raises(InvariantError):
        space.claim(np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64))


@pytest.mark.parametrize("extent", [(-ALIGN_BYTES, ALIGN_BYTES), (PAGES * ALIGN_BYTES, 1), (7, 1)])
def test_what_was_never_given_out_cannot_come_back(extent: tuple[int, int]) -> None:
    space = ExtentAllocator(PAGES * ALIGN_BYTES)
    space.allocate(ALIGN_BYTES, PAGES)
    with pytest.raises(InvariantError):
        give_back(space, [extent])
    space.check_invariants()
    assert space.free_bytes == 0


def test_an_allocator_without_room() -> None:
    space = ExtentAllocator(ALIGN_BYTES - 1)
    assert space.capacity_bytes == 0
    assert space.allocate(1, 3) == []
    space.check_invariants()


def test_check_invariants_sees_a_free_extent_that_one_view_lost() -> None:
    space = ExtentAllocator(PAGES * ALIGN_BYTES)
    space._start_at.clear()
    with pytest.raises(InvariantError):
        space.check_invariants()

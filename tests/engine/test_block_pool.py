"""The bookkeeping of HBM blocks: examples, and a state machine against a plain model."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.errors import InvariantError
from kvstore.tiers.block_pool import BlockPool


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def filled(pool: BlockPool, first: int, count: int) -> list[int]:
    """A chain of `count` named blocks, in use."""
    blocks = pool.take(count)
    for i, block in enumerate(blocks):
        pool.name(block, key(first + i))
    return blocks


def test_a_freed_block_is_found_until_it_is_taken() -> None:
    pool = BlockPool(4)
    blocks = filled(pool, 0, 2)
    pool.release(blocks)
    assert pool.find([key(0), key(1), key(2)]) == blocks
    assert pool.free_blocks == 4
    pool.take(2)  # there are two empty ones
    assert pool.find([key(0), key(1)]) == blocks
    pool.take(1)
    assert len(pool.find([key(0), key(1)])) < 2


def test_the_deepest_block_of_the_oldest_chain_is_forgotten_first() -> None:
    pool = BlockPool(30)
    old, new = filled(pool, 0, 10), filled(pool, 100, 10)
    pool.release(old)
    pool.release(new)
    pool.take(10)
    pool.take(1)  # forgets the 8 deepest of the old chain
    assert len(pool.find([key(i) for i in range(10)])) == 2
    assert len(pool.find([key(100 + i) for i in range(10)])) == 10


def test_use_makes_a_block_the_last_to_go() -> None:
    pool = BlockPool(2)
    first, second = filled(pool, 0, 1), filled(pool, 10, 1)
    pool.release(first)
    pool.release(second)
    pool.share(first)
    pool.release(first)
    assert pool.take(1)
    # Both lost their keys, since a run is forgotten at once; who went first shows in the order.
    assert pool.cached_blocks == 0
    assert pool.free_blocks == 1


def test_blocks_come_in_runs_and_behind_the_one_that_is_named() -> None:
    pool = BlockPool(32)
    a = pool.take(8)
    b = pool.take(8)
    assert a == list(range(a[0], a[0] + 8))
    assert b == list(range(b[0], b[0] + 8))
    assert b[0] > a[-1] + 1, "room is left for the first to grow"
    assert pool.take(1, after=a[-1]) == [a[-1] + 1]
    assert pool.take(1, after=b[-1]) == [b[-1] + 1]


def test_a_sequence_that_grows_alone_stays_in_one_run_when_the_pool_is_warm() -> None:
    pool = BlockPool(32)
    pool.release(filled(pool, 0, 32))
    table = pool.take(4)
    for _ in range(3):
        table += pool.take(1, after=table[-1])
    breaks = sum(b != a + 1 for a, b in pairwise(table))
    assert breaks <= 1


def test_all_or_nothing() -> None:
    pool = BlockPool(3)
    pool.take(2)
    assert pool.take(2) == []
    assert pool.free_blocks == 1


def test_of_two_blocks_with_one_key_the_first_is_known() -> None:
    pool = BlockPool(2)
    (first,), (second,) = pool.take(1), pool.take(1)
    pool.name(first, key(7))
    pool.name(second, key(7))
    assert pool.find([key(7)]) == [first]
    pool.release([second])
    assert pool.cached_blocks == 0
    pool.check_invariants()


def test_mistakes_are_refused() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1)
    with pytest.raises(InvariantError):
        pool.share([1 - block])  # empty
    with pytest.raises(InvariantError):
        pool.name(1 - block, key(0))
    pool.name(block, key(0))
    with pytest.raises(InvariantError):
        pool.name(block, key(1))
    pool.release([block])
    with pytest.raises(InvariantError):
        pool.release([block])
    with pytest.raises(InvariantError):
        pool.hold([block])  # nobody uses it
    with pytest.raises(InvariantError):
        pool.unhold([block])


def test_a_block_is_not_taken_before_its_copy_is_over() -> None:
    pool = BlockPool(3)
    blocks = filled(pool, 0, 2)
    pool.hold(blocks)
    pool.release(blocks)
    assert (pool.used_blocks, pool.held_blocks, pool.free_blocks) == (2, 2, 1)
    assert pool.take(2) == []
    assert pool.find([key(0), key(1)]) == blocks
    pool.share(blocks[:1])  # somebody else needs it meanwhile
    assert (pool.used_blocks, pool.held_blocks) == (2, 1)
    pool.unhold(blocks)
    assert (pool.used_blocks, pool.held_blocks, pool.cached_blocks) == (1, 0, 1)
    assert len(pool.take(2)) == 2
    assert pool.find([key(0), key(1)]) == blocks[:1]


def test_what_is_only_held_can_be_forgotten_but_not_taken() -> None:
    pool = BlockPool(2)
    blocks = filled(pool, 0, 2)
    pool.hold(blocks)
    pool.release(blocks)
    assert pool.clear() == 2
    assert pool.find([key(0)]) == []
    assert pool.take(1) == []
    with pytest.raises(InvariantError):
        pool.share(blocks[:1])  # nobody can know what is in it
    pool.unhold(blocks)
    assert pool.cached_blocks == 0
    assert len(pool.take(2)) == 2


BLOCKS = 12


class PoolMachine(RuleBasedStateMachine):
    """Chains are taken, named, shared, held, released; a plain model knows what must be there."""

    @initialize()
    def start(self) -> None:
        self.pool = BlockPool(BLOCKS)
        self.tables: list[list[int]] = []
        self.copies: list[list[int]] = []  # each holds its blocks
        self.content: dict[int, bytes] = {}  # block -> key it was given, while it was not taken
        self.named: set[bytes] = set()
        self.next_key = 0

    @rule(count=st.integers(1, 6), near=st.booleans())
    def take(self, count: int, near: bool) -> None:
        free = self.pool.free_blocks
        after = self.tables[-1][-1] if near and self.tables else None
        used = {block for table in self.tables + self.copies for block in table}
        taken = self.pool.take(count, after=after)
        assert len(taken) == (count if count <= free else 0)
        assert len(set(taken)) == len(taken)
        assert not used & set(taken)
        for block in taken:
            self.content.pop(block, None)
        if taken:
            self.tables.append(taken)

    @rule(data=st.data(), fresh=st.booleans())
    def name(self, data: st.DataObject, fresh: bool) -> None:
        unnamed = [b for table in self.tables for b in table if self.pool.key(b) is None]
        if not unnamed:
            return
        block = data.draw(st.sampled_from(unnamed))
        self.next_key += fresh
        self.pool.name(block, key(self.next_key))
        self.content[block] = key(self.next_key)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        wanted = [key(data.draw(st.integers(0, self.next_key))) for _ in range(2)]
        found = self.pool.find(wanted)
        self.pool.share(found)
        if found:
            self.tables.append(found)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.tables:
            table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
            self.pool.release(table)

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        if self.tables:
            table = data.draw(st.sampled_from(self.tables))
            held = table[data.draw(st.integers(0, len(table))) :]
            self.pool.hold(held)
            self.copies.append(held)

    @rule(data=st.data())
    def unhold(self, data: st.DataObject) -> None:
        if self.copies:
            copy = self.copies.pop(data.draw(st.integers(0, len(self.copies) - 1)))
            self.pool.unhold(copy)

    @rule()
    def clear(self) -> None:
        free = self.pool.free_blocks
        self.pool.clear()
        assert self.pool.cached_blocks == 0
        used = {block for table in self.tables for block in table}
        for number in range(self.next_key + 1):
            assert used.issuperset(self.pool.find([key(number)]))
        assert self.pool.free_blocks == free

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_invariants()
        counts = Counter(block for table in self.tables for block in table)
        for block in range(BLOCKS):
            assert self.pool.references(block) == counts[block]
        for number in range(self.next_key + 1):
            for block in self.pool.find([key(number)]):
                # Never found under a key that its content was not given.
                assert self.content[block] == key(number)
        held = {block for copy in self.copies for block in copy}
        assert self.pool.free_blocks == BLOCKS - len(counts.keys() | held)
        assert self.pool.held_blocks == len(held - counts.keys())


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

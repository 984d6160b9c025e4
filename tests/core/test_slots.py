"""The slot table: chains, retentions, restarts and bounds, one by one."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.allocator import ALIGN_BYTES
from kvstore.errors import InvariantError
from kvstore.slots import Batch, SlotTable, StoredBlocks
from tests.core.table_model import CAPACITY, NAMESPACES, array, name


def filled(count: int, *, pages: int = 64, priority: int = 35, ttl_s: float = 0.0) -> SlotTable:
    """A table with one chain of `count` one-page blocks in rows 0, 1, 2, ..."""
    table = SlotTable(pages * ALIGN_BYTES)
    rows = table.reserve(ALIGN_BYTES, count)
    keys = [name(i) for i in range(count)]
    parents = [NAMESPACES[0], *keys[:-1]]
    table.commit(rows, Batch(NAMESPACES[0], keys, parents, priority, ttl_s))
    return table


def test_a_chain_goes_from_its_deepest_block() -> None:
    table = filled(6)
    assert table.victims(ALIGN_BYTES, 4, 35, 0.0).tolist() == [5, 4, 3, 2]
    assert table.find([name(i) for i in range(6)]) == [0, 1, None, None, None, None]


def test_a_pinned_end_holds_its_whole_chain() -> None:
    table = filled(6)
    table.pin(array([5]))
    assert table.victims(ALIGN_BYTES, 6, 100, 0.0).tolist() == []
    table.unpin(array([5]), 0.0)
    assert table.victims(ALIGN_BYTES, 6, 100, 0.0).tolist() == [5, 4, 3, 2, 1, 0]


def test_a_block_that_can_never_fit_evicts_nothing() -> None:
    table = filled(4, pages=4)
    assert table.victims(5 * ALIGN_BYTES, 1, 100, 0.0).tolist() == []
    assert len(table) == 4


def test_a_retention_ends_though_the_block_was_in_use_when_its_time_came() -> None:
    table = filled(1, priority=90)
    table.expire_at(array([0]), 10.0)
    table.pin(array([0]))
    table.expire(20.0)
    assert table.index.priority[0] == 90
    table.unpin(array([0]), 21.0)
    table.expire(21.0)
    assert table.index.priority[0] == 35
    assert table.protected_bytes[table.namespace_id(NAMESPACES[0])] == 0


def test_the_clock_of_a_retention_starts_at_each_release() -> None:
    table = filled(1, priority=90, ttl_s=10.0)
    for now_s in (0.0, 9.0, 18.0):
        table.pin(array([0]))
        table.unpin(array([0]), now_s)
    table.expire(27.0)
    assert table.index.priority[0] == 90
    table.expire(28.0)
    assert table.index.priority[0] == 35


def test_use_without_end_does_not_grow_the_queues() -> None:
    """`check_invariants` holds both heaps to twice their live entries."""
    table = filled(3, ttl_s=10.0)
    row = array([0])
    for i in range(2_000):
        table.pin(row)
        table.unpin(row, float(i) / 1000)
        table.retain(row, i % 2 * 60, 10.0 - i / 1000, 0.0)
    table.check_invariants()


def test_blocks_that_come_and_go_do_not_grow_the_queues() -> None:
    table = filled(1)
    for i in range(1, 2_000):
        rows = table.reserve(1, 1)
        table.commit(rows, Batch(NAMESPACES[0], [name(i)], [name(i - 1)]))
        table.retain(rows, 80, 5.0, float(i))
        table.evict(rows)
        table.free(rows)
    table.check_invariants()
    assert len(table.index.keys) == 1024


def test_evicted_keys_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.slots.EVICTED_REMEMBERED", 10)
    table = SlotTable(64 * ALIGN_BYTES)
    for i in range(100):
        rows = table.reserve(1, 1)
        table.commit(rows, Batch(NAMESPACES[0], [name(i)], [NAMESPACES[0]]))
        table.free(table.victims(1, 1, 35, 0.0))
        assert all(table.was_evicted(name(j)) for j in range(max(0, i - 9), i + 1))
        assert sum(table.was_evicted(name(j)) for j in range(i + 1)) <= 20


def test_asking_for_a_namespace_does_not_remember_it() -> None:
    table = filled(1)
    assert table.namespace_id(b"never seen") == -1
    assert table.protected_bytes[table.namespace_id(b"never seen")] == 0
    assert table._namespaces == [NAMESPACES[0]]


def test_load_refuses_a_key_that_stands_twice() -> None:
    table = SlotTable(CAPACITY)
    two = np.array([0, ALIGN_BYTES])
    with pytest.raises(InvariantError, match="twice"):
        table.load(
            StoredBlocks(
                [b"k", b"k"],
                [b"p", b"p"],
                [b"n", b"n"],
                two,
                np.ones(2, dtype=np.int64),
                np.zeros(2, dtype=np.uint8),
                np.zeros(2),
            )
        )


def test_load_is_for_a_table_that_has_held_nothing() -> None:
    table = filled(2)
    rows = array([0, 1])
    table.evict(rows)
    table.free(rows)
    none = np.array([], dtype=np.int64)
    with pytest.raises(InvariantError, match="held nothing"):
        table.load(StoredBlocks([], [], [], none, none, none.astype(np.uint8), none.astype(float)))


def test_load_leaves_out_what_overlaps() -> None:
    table = SlotTable(CAPACITY)
    kept = table.load(
        StoredBlocks(
            [b"a", b"b", b"c"],
            [b"n", b"a", b"b"],
            [b"n"] * 3,
            np.array([0, 0, ALIGN_BYTES]),
            np.full(3, ALIGN_BYTES),
            np.array([35, 90, 90], dtype=np.uint8),
            np.zeros(3),
        )
    )
    assert kept == [True, False, True]
    assert table.find([b"a", b"b", b"c"]) == [0, None, 1]
    assert table.protected_bytes[table.namespace_id(b"n")] == ALIGN_BYTES
    table.check_invariants()


@pytest.mark.parametrize("damage", ["child", "protected", "end", "extent", "expiry"])
def test_check_invariants_sees(damage: str) -> None:
    table = filled(3)
    table.check_invariants()
    if damage == "child":
        table._order._children[name(0)] += 1
    elif damage == "protected":
        table.protected_bytes[0] += 1
    elif damage == "end":
        table._order._ends.discard(2)
    elif damage == "extent":
        table.index.offset[1] = table.index.offset[0]
    else:
        table.index.expires_s[0] = 5.0
    with pytest.raises(InvariantError):
        table.check_invariants()

"""The slot table against a plain model: who is there, who must go, in which order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvstore.allocator import ALIGN_BYTES, align_up
from kvstore.errors import IllegalMoveError
from kvstore.hashing import Key
from kvstore.index import State
from kvstore.policy import EvictionPolicy, Fifo, Lru
from kvstore.slots import Batch, SlotTable, StoredBlocks
from tests.core.table_model import CAPACITY, NAMESPACES, Block, TableModel, array, name

SIZES = (1, ALIGN_BYTES, 3 * ALIGN_BYTES)
PRIORITIES = (0, 20, 35, 36, 80, 100)

priorities = st.sampled_from(PRIORITIES)
ttls = st.sampled_from([0.0, 5.0, 50.0])


def drain(table: SlotTable) -> list[Key]:
    """Keys in the order in which they would be evicted, which they are."""
    order: list[Key] = []
    while len(table):
        key_of = {row: key for key, row in table.index.rows_by_key.items()}
        victims = table.victims(1, 1, 100, 0.0)
        order.extend(key_of[row] for row in victims.tolist())
        table.free(victims)
    return order


class SlotMachine(RuleBasedStateMachine):
    """Draws rows with `some`, applies each rule to the table and to the model."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self.keys: list[Key] = []  # every key ever used: a tree by `parents`
        self.parents: dict[Key, Key] = {}

    @initialize(policy=st.sampled_from([Lru, Fifo]))
    def start(self, policy: Callable[[], EvictionPolicy]) -> None:
        self.table = SlotTable(CAPACITY, policy())
        self.model = TableModel(touch_counts=policy is Lru)

    def some(self, data: st.DataObject, state: State, *, pins: bool = True) -> list[int]:
        rows = [r for r in self.model.rows(state) if pins or not self.model.blocks[r].pins]
        return data.draw(st.lists(st.sampled_from(rows), unique=True)) if rows else []

    @rule(nbytes=st.sampled_from(SIZES), count=st.integers(0, 8))
    def reserve(self, nbytes: int, count: int) -> None:
        for row in self.table.reserve(nbytes, count).tolist():
            assert row not in self.model.blocks
            self.model.blocks[row] = Block(nbytes, self.table.index.offset.item(row))

    @rule(data=st.data(), namespace=st.sampled_from(NAMESPACES), priority=priorities, ttl_s=ttls)
    def commit(self, data: st.DataObject, namespace: bytes, priority: int, ttl_s: float) -> None:
        rows = self.some(data, State.RESERVED)
        batch = [self.draw_key(data, namespace) for _ in rows]
        keys, parents = [key for key, _ in batch], [parent for _, parent in batch]
        won = self.table.commit(array(rows), Batch(namespace, keys, parents, priority, ttl_s))
        assert won == self.model.commit(rows, batch, namespace, priority, ttl_s)

    def draw_key(self, data: st.DataObject, namespace: bytes) -> tuple[Key, Key]:
        """A key seen before, or a new child of one, or a new first block; with its parent."""
        if self.keys and data.draw(st.integers(0, 3)) == 0:
            key = data.draw(st.sampled_from(self.keys))
            return key, self.parents[key]
        key = name(len(self.keys))
        # Mostly the youngest key, so that chains grow long.
        choices = [namespace, *self.keys[-1:] * 4, *self.keys]
        self.keys.append(key)
        self.parents[key] = data.draw(st.sampled_from(choices))
        return key, self.parents[key]

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        rows = self.some(data, State.RESERVED)
        self.table.free(array(rows))
        for row in rows:
            del self.model.blocks[row]

    @rule(data=st.data())
    def free_evicted(self, data: st.DataObject) -> None:
        rows = self.some(data, State.EVICTING)
        self.table.free(array(rows))
        for row in rows:
            del self.model.blocks[row]

    @rule(data=st.data(), times=st.integers(1, 2))
    def pin(self, data: st.DataObject, times: int) -> None:
        rows = self.some(data, State.RESIDENT) * times
        self.table.pin(array(rows))
        for row in rows:
            self.model.blocks[row].pins += 1

    @rule(data=st.data(), whole=st.booleans())
    def unpin(self, data: st.DataObject, whole: bool) -> None:
        pinned = [row for row, block in self.model.blocks.items() if block.pins]
        rows = data.draw(st.lists(st.sampled_from(pinned), unique=True)) if pinned else []
        if whole:
            rows = [row for row in rows for _ in range(self.model.blocks[row].pins)]
        self.table.unpin(array(rows), self.now_s)
        self.model.unpin(rows, self.now_s)

    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        rows = self.some(data, State.RESIDENT)
        self.table.touch(array(rows))
        self.model.touch(rows)

    @rule(data=st.data(), priority=priorities, ttl_s=ttls)
    def retain(self, data: st.DataObject, priority: int, ttl_s: float) -> None:
        rows = self.some(data, State.RESIDENT)
        self.table.retain(array(rows), priority, ttl_s, self.now_s)
        self.model.retain(rows, priority, ttl_s, self.now_s)

    @rule(data=st.data(), in_s=st.sampled_from([-1.0, 5.0, 100.0]))
    def expire_at(self, data: st.DataObject, in_s: float) -> None:
        rows = self.some(data, State.RESIDENT)
        self.table.expire_at(array(rows), self.now_s + in_s)
        for row in rows:
            self.model.blocks[row].expires_s = self.now_s + in_s

    @rule(seconds=st.sampled_from([1.0, 5.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.table.expire(self.now_s)
        self.model.expire(self.now_s)

    @rule(
        data=st.data(),
        nbytes=st.sampled_from(SIZES),
        count=st.integers(1, 8),
        priority=priorities,
        seconds=st.sampled_from([0.0, 0.0, 60.0]),
    )
    def victims(
        self, data: st.DataObject, nbytes: int, count: int, priority: int, seconds: float
    ) -> None:
        self.now_s += seconds
        keep = set(self.some(data, State.RESIDENT)) if data.draw(st.booleans()) else set()
        chosen = self.table.victims(nbytes, count, priority, self.now_s, keep).tolist()
        wanted = count * align_up(nbytes)
        assert chosen == self.model.victims(wanted, priority, self.now_s, keep)

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        rows = self.some(data, State.RESIDENT, pins=False)
        self.table.evict(array(rows))
        for row in rows:
            self.model.evict(row)

    @rule(data=st.data())
    def what_is_illegal_raises_and_changes_nothing(self, data: st.DataObject) -> None:
        table, blocks = self.table, self.model.blocks
        taken = list(blocks)
        free = next(row for row in range(len(table.index.keys)) if row not in blocks)
        row = data.draw(st.sampled_from([*taken, free]))
        state = blocks[row].state if row in blocks else State.FREE
        others = data.draw(st.permutations([row, *self.some(data, state)]))
        rows, count = array(others), len(others)
        batch = Batch(NAMESPACES[0], [b"new"] * count, [b""] * count)
        calls: list[Callable[[], object]] = []
        if state is not State.RESERVED:
            calls.append(lambda: table.commit(rows, batch))
        if state not in (State.RESERVED, State.EVICTING):
            calls.append(lambda: table.free(rows))
        if state is not State.RESIDENT or blocks[row].pins or len(set(others)) < len(others):
            calls.append(lambda: table.evict(rows))
        if state is not State.RESIDENT:
            calls += [
                lambda: table.pin(rows),
                lambda: table.retain(rows, 50, 0.0, 0.0),
                lambda: table.expire_at(rows, 1.0),
            ]
        if state is not State.RESIDENT or not blocks[row].pins:
            calls.append(lambda: table.unpin(rows, 0.0))
        calls.append(lambda: table.commit(rows[:0], batch))
        calls.append(lambda: table.retain(rows[:0], 101, 0.0, 0.0))
        before = snapshot(table)
        with pytest.raises(IllegalMoveError):
            data.draw(st.sampled_from(calls))()
        assert snapshot(table) == before

    @precondition(lambda self: any(b.state is State.RESIDENT for b in self.model.blocks.values()))
    @rule()
    def a_restart_is_the_same_table(self) -> None:
        """Loaded anew, the same blocks lie in the same places and go in the same order."""
        resident = [(row, self.model.blocks[row]) for row in self.model.rows(State.RESIDENT)]
        resident.sort(key=lambda item: (item[1].last_use, item[0]))
        blocks = [block for _, block in resident]
        loaded = SlotTable(CAPACITY)
        assert all(
            loaded.load(
                StoredBlocks(
                    [block.key for block in blocks],
                    [block.parent for block in blocks],
                    [block.namespace for block in blocks],
                    np.array([block.offset for block in blocks], dtype=np.int64),
                    np.array([block.nbytes for block in blocks], dtype=np.int64),
                    np.array([block.priority for block in blocks], dtype=np.uint8),
                    np.array([block.expires_s for block in blocks]),
                )
            )
        )
        loaded.check_invariants()
        for row, block in enumerate(blocks):
            assert loaded.find([block.key]) == [row]
            assert loaded.index.offset[row] == block.offset
            assert loaded.namespace(row) == block.namespace
            assert loaded.index.expires_s[row] == block.expires_s
        for namespace in NAMESPACES:
            number = loaded.namespace_id(namespace)
            assert loaded.protected_bytes[number] == self.model.protected_bytes(namespace)
        order = [self.plain_order(blocks.copy()), drain(loaded)]
        assert order[0] == order[1]
        loaded.check_invariants()
        assert loaded.space.used_bytes == 0

    def plain_order(self, blocks: list[Block]) -> list[Key]:
        """`blocks` are in order of use; nothing is pinned after a restart."""
        order = []
        while blocks:
            # Zero is the time of `drain`, and nothing has expired by then.
            parents = {block.parent for block in blocks}
            ends = [block for block in blocks if block.key not in parents]
            first = min(ends, key=lambda block: block.priority)
            order.append(first.key)
            blocks.remove(first)
        return order

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "table"):
            return
        table, model = self.table, self.model
        table.check_invariants()
        index = table.index
        for row, block in model.blocks.items():
            assert index.state[row] == block.state
            assert (index.offset[row], index.nbytes[row]) == (block.offset, block.nbytes)
            if block.state is State.RESIDENT:
                assert table.find([block.key]) == [row]
                assert index.pins[row] == block.pins
                assert index.priority[row] == block.priority
                assert index.ttl_s[row] == block.ttl_s
                assert index.expires_s[row] == block.expires_s
                assert table.namespace(row) == block.namespace
        assert len(table) == len(model.rows(State.RESIDENT))
        assert int((index.state != State.FREE).sum()) == len(model.blocks)
        for key in self.keys:
            assert table.was_evicted(key) == (key in model.evicted and model.row_of(key) is None)
        for namespace in NAMESPACES:
            number = table.namespace_id(namespace)
            assert table.protected_bytes[number] == model.protected_bytes(namespace)


TestSlots = SlotMachine.TestCase
TestSlots.settings = settings(settings.get_profile("default"), stateful_step_count=60)


def snapshot(table: SlotTable) -> dict[str, Any]:
    """Everything that a caller could notice."""
    index = table.index
    columns = {
        name: value.tolist()
        for name, value in vars(index).items()
        if isinstance(value, np.ndarray) and not name.startswith("_")
    }
    return {
        **columns,
        "keys": index.keys.copy(),
        "rows_by_key": index.rows_by_key.copy(),
        "free": table.space.free_extents(),
        "protected": dict(+table.protected_bytes),
        "evicted": table.evicted_blocks,
    }

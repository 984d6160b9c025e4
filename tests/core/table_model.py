"""What a `SlotTable` should do, said in the plainest way: one dict of blocks, searched whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvstore.allocator import ALIGN_BYTES, align_up
from kvstore.hashing import Key
from kvstore.index import State
from kvstore.policy import Rows
from kvstore.retention import DEFAULT_PRIORITY

CAPACITY = 24 * ALIGN_BYTES
NAMESPACES = (b"A" * 16, b"B" * 16)


def array(rows: list[int]) -> Rows:
    return np.array(rows, dtype=np.int64)


def name(number: int) -> Key:
    return number.to_bytes(16, "big")


@dataclass
class Block:
    nbytes: int
    offset: int
    state: State = State.RESERVED
    key: Key = b""
    parent: Key = b""
    namespace: bytes = b""
    priority: int = DEFAULT_PRIORITY
    ttl_s: float = 0.0
    expires_s: float = 0.0
    last_use: int = 0
    pins: int = 0


class TableModel:
    def __init__(self, touch_counts: bool) -> None:
        self.touch_counts = touch_counts
        self.blocks: dict[int, Block] = {}  # row -> block, in whatever state but FREE
        self.uses = 0
        self.evicted: set[Key] = set()

    def rows(self, state: State) -> list[int]:
        return sorted(row for row, block in self.blocks.items() if block.state is state)

    def row_of(self, key: Key) -> int | None:
        resident = self.rows(State.RESIDENT)
        return next((row for row in resident if self.blocks[row].key == key), None)

    def commit(
        self, rows: list[int], batch: list[tuple[Key, Key]], namespace: bytes, priority: int,
        ttl_s: float,
    ) -> list[bool]:  # fmt: skip
        won = []
        self.uses += 1
        for row, (key, parent) in zip(rows, batch, strict=True):
            won.append(self.row_of(key) is None)
            if not won[-1]:
                del self.blocks[row]
                continue
            block = self.blocks[row]
            block.state, block.key, block.parent = State.RESIDENT, key, parent
            block.namespace, block.priority, block.ttl_s = namespace, priority, ttl_s
            block.last_use = self.uses
            self.evicted.discard(key)
        return won

    def touch(self, rows: list[int]) -> None:
        if self.touch_counts:
            self.uses += 1
            for row in rows:
                self.blocks[row].last_use = self.uses

    def unpin(self, rows: list[int], now_s: float) -> None:
        for row in rows:
            self.blocks[row].pins -= 1
        for row in rows:
            block = self.blocks[row]
            if block.ttl_s and not block.pins:
                block.expires_s = now_s + block.ttl_s

    def retain(self, rows: list[int], priority: int, ttl_s: float, now_s: float) -> None:
        for row in rows:
            block = self.blocks[row]
            block.priority, block.ttl_s = priority, ttl_s
            block.expires_s = now_s + ttl_s if ttl_s and not block.pins else 0.0

    def expire(self, now_s: float) -> None:
        for block in self.blocks.values():
            if 0 < block.expires_s <= now_s and not block.pins:
                block.priority, block.ttl_s, block.expires_s = DEFAULT_PRIORITY, 0.0, 0.0

    def evict(self, row: int) -> None:
        block = self.blocks[row]
        self.evicted.add(block.key)
        block.state, block.key = State.EVICTING, b""

    def victims(self, wanted_bytes: int, priority: int, now_s: float, keep: set[int]) -> list[int]:
        self.expire(now_s)
        chosen: list[int] = []
        while wanted_bytes > 0:
            row = self.next_victim(priority, keep)
            if row is None:
                break
            chosen.append(row)
            wanted_bytes -= align_up(self.blocks[row].nbytes)
            self.evict(row)
        return chosen

    def next_victim(self, priority: int, keep: set[int]) -> int | None:
        resident = {row: self.blocks[row] for row in self.rows(State.RESIDENT)}
        parents = {block.parent for block in resident.values()}
        candidates = [
            (block.priority, block.last_use, row)
            for row, block in resident.items()
            if not block.pins and row not in keep and block.key not in parents
        ]
        least = min(candidates, default=None)
        return least[2] if least is not None and least[0] <= priority else None

    def protected_bytes(self, namespace: bytes) -> int:
        return sum(
            block.nbytes
            for block in self.blocks.values()
            if block.state is State.RESIDENT
            and block.namespace == namespace
            and block.priority > DEFAULT_PRIORITY
        )

"""A Mooncake client without memory of its own to lend, turn by turn: all blocks lie elsewhere.

Runs in Mooncake's environment. Put is batch_put_from, get is batch_get_into,
all blocks in one call, from and to registered buffers.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from typing import Any

from benchmarks.workers.lines import serve
from benchmarks.workers.memory import Memory

LOCAL_BUFFER_BYTES = 16 << 20  # for what is not registered, of which there is nothing


class MooncakeTurns:
    """`count` blocks of `block_bytes` in the memory that another process has lent to `master`."""

    def __init__(self, host: str, master: str, block_bytes: int, count: int) -> None:
        self._store: Any = import_module("mooncake.store").MooncakeDistributedStore()
        status = self._store.setup(
            host, "P2PHANDSHAKE", 0, LOCAL_BUFFER_BYTES, "tcp", "", f"{host}:{master}"
        )
        self._memory = memory = Memory(block_bytes, count)
        self._sizes = [block_bytes] * count
        self._targets = [memory.target[i].ctypes.data for i in range(count)]
        for registered in (memory.source, memory.target):
            status = status or self._store.register_buffer(
                registered.ctypes.data, registered.nbytes
            )
        if status:
            raise RuntimeError(f"Mooncake says {status}")
        self._keys: list[str] = []

    def describe(self) -> str:
        return "Mooncake 0.3.13.post1, another process over TCP"

    def put(self) -> float:
        """New blocks into an empty store; seconds."""
        self._store.batch_remove(self._keys, True)
        number = self._memory.next_round()
        self._keys = [f"{number}-{i}" for i in range(self._memory.count)]
        sources = [self._memory.source[i].ctypes.data for i in self._memory.order]
        start = time.perf_counter()
        statuses = self._store.batch_put_from(self._keys, sources, self._sizes)
        seconds = time.perf_counter() - start
        if any(statuses):
            raise RuntimeError(f"Mooncake did not take all blocks: {set(statuses)}")
        return seconds

    def get(self) -> float:
        """The last blocks put, into buffers of ours; seconds."""
        self._memory.forget()
        start = time.perf_counter()
        self._store.batch_get_into(self._keys, self._targets, self._sizes)
        seconds = time.perf_counter() - start
        self._memory.check()
        return seconds


def build() -> dict[str, Any]:
    host, master, block_bytes, count = sys.argv[1:]
    turns = MooncakeTurns(host, master, int(block_bytes), int(count))
    return {"describe": turns.describe, "put": turns.put, "get": turns.get}


if __name__ == "__main__":
    serve(build)

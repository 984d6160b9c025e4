"""redis-py with hiredis as a client of a Redis on a Unix socket, turn by turn.

Runs in its environment. Put is MSET, get is MGET and a copy into the caller's
buffers. What made it fastest here: large blocks go to the socket as they are
(redis-py's own packer, not hiredis', which copies them into one command), and
replies are read by the MiB. How many blocks a command has is tried out first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from benchmarks.workers.lines import serve
from benchmarks.workers.memory import Memory

BATCHES = (1, 2, 4, 8, 16, 32, 64)  # blocks of one command
READ_BYTES = 1 << 20
PACKED_BYTES = 6000  # of a value that redis-py still copies into a command: its default


class RedisTurns:
    """`count` blocks of `block_bytes` in the Redis at `path`."""

    def __init__(self, path: str, block_bytes: int, count: int) -> None:
        redis: Any = import_module("redis")
        connection: Any = import_module("redis.connection")
        encode = connection.Encoder("utf-8", "strict", False).encode
        pool = connection.ConnectionPool(
            connection_class=connection.UnixDomainSocketConnection,
            path=path,
            socket_read_size=READ_BYTES,
            command_packer=connection.PythonRespSerializer(PACKED_BYTES, encode),
        )
        self._redis = redis.Redis(connection_pool=pool)
        self._memory = Memory(block_bytes, count)
        self._put_batch = self._fastest(self._put)
        self._get_batch = self._fastest(self._get)
        versions = [import_module(name).__version__ for name in ("redis", "hiredis")]
        self._described = (
            f"Redis {self._redis.info()['redis_version']}, Unix socket; "
            f"redis-py {versions[0]}, hiredis {versions[1]}, "
            f"MSET of {self._put_batch}, MGET of {self._get_batch}"
        )

    def describe(self) -> str:
        return self._described

    def put(self) -> float:
        """The blocks into an empty Redis; seconds."""
        return self._put(self._put_batch)

    def get(self) -> float:
        """The last blocks put, into buffers of ours; seconds."""
        return self._get(self._get_batch)

    def _fastest(self, work: Callable[[int], float]) -> int:
        batches = [batch for batch in BATCHES if batch <= self._memory.count]
        work(batches[0])
        seconds = {batch: min(work(batch), work(batch)) for batch in batches}
        return min(seconds, key=lambda batch: seconds[batch])

    def _put(self, batch: int) -> float:
        memory = self._memory
        memory.next_round()
        self._redis.flushall()
        keys = self._keys()
        blocks = [memoryview(memory.source[i]) for i in memory.order]
        start = time.perf_counter()
        for i in range(0, memory.count, batch):
            self._redis.mset(dict(zip(keys[i : i + batch], blocks[i : i + batch], strict=True)))
        return time.perf_counter() - start

    def _get(self, batch: int) -> float:
        memory = self._memory
        memory.forget()
        keys = self._keys()
        blocks = [memoryview(block) for block in memory.target]
        start = time.perf_counter()
        for i in range(0, memory.count, batch):
            came = self._redis.mget(keys[i : i + batch])
            for block, value in zip(blocks[i : i + batch], came, strict=True):
                block[:] = value
        seconds = time.perf_counter() - start
        memory.check()
        return seconds

    def _keys(self) -> list[bytes]:
        return [i.to_bytes(16, "little") for i in range(self._memory.count)]


def build() -> dict[str, Any]:
    path, block_bytes, count = sys.argv[1:]
    turns = RedisTurns(path, int(block_bytes), int(count))
    return {"describe": turns.describe, "put": turns.put, "get": turns.get}


if __name__ == "__main__":
    serve(build)

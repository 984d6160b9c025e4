"""LMCache's StorageManager over its server ("lm://"), turn by turn. Runs in LMCache's environment.

The server forgets nothing, so every put writes the same keys with other bytes.
It acknowledges nothing either, but answers in order: once it says that the last
key is there, all of them are.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from typing import Any

from benchmarks.workers.lines import serve
from benchmarks.workers.lmcache_worker import LAYERS, TOKENS, open_manager
from benchmarks.workers.memory import Memory

_BACKEND = "RemoteBackend"


class ServerTurns:
    """`count` blocks of `block_bytes` in the server at `url`."""

    def __init__(self, url: str, block_bytes: int, count: int) -> None:
        torch: Any = import_module("torch")
        torch.set_num_threads(1)
        self._dtype = torch.bfloat16
        self._shape = torch.Size([2, LAYERS, TOKENS, block_bytes // (2 * LAYERS * TOKENS * 2)])
        self._memory = Memory(block_bytes, count)
        self._source, self._target = (
            torch.from_numpy(held).view(self._dtype).reshape(count, *self._shape)
            for held in (self._memory.source, self._memory.target)
        )
        key: Any = import_module("lmcache.utils").CacheEngineKey
        self._keys = [key("benchmark", 1, 0, i + 1, self._dtype) for i in range(count)]
        self._format: Any = import_module("lmcache.v1.memory_management").MemoryFormat.KV_2LTD
        self._manager = open_manager(
            self._dtype,
            self._shape,
            local_cpu=False,
            # Twice: a put allocates before the blocks of the round before are gone.
            max_local_cpu_size=(2.2 * block_bytes * count + (64 << 20)) / 2**30,
            remote_url=url,
            remote_serde="naive",
        )
        if not self._manager.storage_backends[_BACKEND].connection:
            raise RuntimeError(f"LMCache is not connected to {url}")

    def describe(self) -> str:
        return "LMCache 0.5.6 server (lm://), another process over TCP"

    def put(self) -> float:
        """The blocks into the server, until the last one is found there; seconds."""
        self._memory.next_round()
        backend = self._manager.storage_backends[_BACKEND]
        blocks = [self._source[i] for i in self._memory.order]
        start = time.perf_counter()
        objects = self._manager.batched_allocate(
            self._shape, self._dtype, len(blocks), fmt=self._format
        )
        for held, block in zip(objects, blocks, strict=True):
            held.tensor.copy_(block)
        self._manager.batched_put(self._keys, objects)
        while not backend.contains(self._keys[-1]):
            time.sleep(0.001)
        return time.perf_counter() - start

    def get(self) -> float:
        """The last blocks put, into buffers of ours; seconds."""
        self._memory.forget()
        start = time.perf_counter()
        objects = self._manager.batched_get(self._keys, location=_BACKEND)
        for held, block in zip(objects, self._target, strict=True):
            block.copy_(held.tensor)
            held.ref_count_down()
        seconds = time.perf_counter() - start
        self._memory.check()
        return seconds


def build() -> dict[str, Any]:
    url, block_bytes, count = sys.argv[1:]
    turns = ServerTurns(url, int(block_bytes), int(count))
    return {"describe": turns.describe, "put": turns.put, "get": turns.get}


if __name__ == "__main__":
    serve(build)

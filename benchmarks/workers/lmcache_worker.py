"""LMCache's own StorageManager over its local CPU or local disk backend, turn by turn.

Runs in LMCache's environment. Put is allocate, copy into the tensors,
batched_put, and the wait until the last block is found; get is batched_get,
copy out of the tensors, and the release of the references. The memcpy is
torch's, which was faster here than numpy's on the same tensors.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.workers.lines import serve

LAYERS, TOKENS = 8, 16


class StorageManagerTurns:
    """`count` blocks of `block_bytes` in one backend: "LocalCPUBackend" or "LocalDiskBackend"."""

    def __init__(self, backend: str, block_bytes: int, count: int, directory: Path) -> None:
        torch: Any = import_module("torch")
        torch.set_num_threads(1)
        self._key: Any = import_module("lmcache.utils").CacheEngineKey
        self._format: Any = import_module("lmcache.v1.memory_management").MemoryFormat.KV_2LTD
        self._dtype = torch.bfloat16
        self._shape = torch.Size([2, LAYERS, TOKENS, block_bytes // (2 * LAYERS * TOKENS * 2)])
        self._backend, self._count = backend, count
        self._round = 0
        self._manager = self._open(block_bytes * count, directory)
        shape = (count, *self._shape)
        generator = torch.Generator().manual_seed(0)
        self._source = torch.randint(0, 1 << 15, shape, dtype=torch.int16, generator=generator)
        self._source = self._source.view(self._dtype)
        self._target = torch.zeros(shape, dtype=self._dtype)
        self._torch = torch

    def _open(self, total_bytes: int, directory: Path) -> Any:
        on_disk = self._backend == "LocalDiskBackend"
        return open_manager(
            self._dtype,
            self._shape,
            local_cpu=not on_disk,
            # Twice: a put allocates before the blocks of the round before are gone.
            max_local_cpu_size=(2.2 * total_bytes + (64 << 20)) / 2**30,
            local_disk=f"{directory}/" if on_disk else None,
            # Removing does not lower its count of bytes, so all rounds must fit.
            max_local_disk_size=100 * total_bytes / 2**30 if on_disk else 0.0,
            extra_config={"use_odirect": True, "local_cpu.pinned_align_bytes": 4096},
        )

    def _keys(self) -> list[Any]:
        first = (self._round << 32) + 1
        return [self._key("benchmark", 1, 0, first + i, self._dtype) for i in range(self._count)]

    def put(self) -> float:
        """A new set of blocks into the backend, until all of them are found; seconds."""
        self._manager.batched_remove(self._keys())
        self._round += 1
        keys = self._keys()
        backend = self._manager.storage_backends[self._backend]
        start = time.perf_counter()
        objects = self._manager.batched_allocate(
            self._shape, self._dtype, self._count, fmt=self._format
        )
        for held, block in zip(objects, self._source, strict=True):
            held.tensor.copy_(block)
        self._manager.batched_put(keys, objects)
        while not all(backend.contains(key) for key in reversed(keys)):
            time.sleep(0.001)
        return time.perf_counter() - start

    def get(self) -> float:
        """The last set put, from the backend into buffers of ours; seconds."""
        keys = self._keys()
        self._target.zero_()
        start = time.perf_counter()
        objects = self._manager.batched_get(keys, location=self._backend)
        for held, block in zip(objects, self._target, strict=True):
            block.copy_(held.tensor)
            held.ref_count_down()
        seconds = time.perf_counter() - start
        as_bits = self._torch.int16
        if not self._torch.equal(self._target.view(as_bits), self._source.view(as_bits)):
            raise RuntimeError("what came out of LMCache is not what went in")
        return seconds


def open_manager(dtype: Any, shape: Any, **settings: Any) -> Any:
    """LMCache's StorageManager for blocks of `shape` ([2, LAYERS, TOKENS, width])."""
    config = import_module("lmcache.v1.config").LMCacheEngineConfig.from_defaults(
        chunk_size=TOKENS, **settings
    )
    metadata = import_module("lmcache.v1.metadata").LMCacheMetadata(
        model_name="benchmark",
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=dtype,
        kv_shape=(LAYERS, 2, TOKENS, 1, shape[-1]),
    )
    events = import_module("lmcache.v1.event_manager").EventManager()
    manager = import_module("lmcache.v1.storage_backend.storage_manager").StorageManager
    return manager(config, metadata, events)


def build() -> dict[str, Any]:
    backend, block_bytes, count, directory = sys.argv[1:]
    turns = StorageManagerTurns(backend, int(block_bytes), int(count), Path(directory))
    return {"put": turns.put, "get": turns.get}


if __name__ == "__main__":
    serve(build)

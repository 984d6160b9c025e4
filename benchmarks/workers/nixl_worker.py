"""NIXL's POSIX plugin on one slab file, turn by turn: raw transfers, no keys, no checksums.

Runs in NIXL's environment. A ceiling, not a peer.
"""

from __future__ import annotations

import mmap
import os
import random
import sys
import time
from importlib import import_module
from typing import Any

from benchmarks.workers.lines import serve


class PosixTurns:
    """Every block of `file` once, in random order, from or to memory of this process."""

    def __init__(self, file: str, block_bytes: int, count: int) -> None:
        numpy: Any = import_module("numpy")
        api: Any = import_module("nixl_cu12._api")
        self._descriptor = os.open(file, os.O_RDWR | os.O_DIRECT)
        total_bytes = block_bytes * count
        self._memory = mmap.mmap(-1, total_bytes)
        held = numpy.frombuffer(self._memory, numpy.uint8)
        random_bytes = numpy.random.default_rng(0).bytes(total_bytes)
        held[:] = numpy.frombuffer(random_bytes, numpy.uint8)
        self._address = int(held.ctypes.data)
        self._held = held
        self._block_bytes, self._count = block_bytes, count
        self._agent = api.nixl_agent("ceiling", api.nixl_agent_config(backends=[]))
        self._agent.create_backend("POSIX", {"use_uring": "true", "use_aio": "false"})
        memory = [(self._address, total_bytes, 0, "memory")]
        slab = [(0, total_bytes, self._descriptor, "slab")]
        self._registered = (
            self._agent.register_memory(memory, "DRAM", backends=["POSIX"]),
            self._agent.register_memory(slab, "FILE", backends=["POSIX"]),
        )

    def read(self) -> float:
        return self._transfer("READ")

    def write(self) -> float:
        return self._transfer("WRITE")

    def _transfer(self, operation: str) -> float:
        step, agent = self._block_bytes, self._agent
        order = random.sample(range(self._count), self._count)
        start = time.perf_counter()
        memory = agent.get_xfer_descs(
            [(self._address + i * step, step, 0) for i in range(self._count)], "DRAM"
        )
        slab = agent.get_xfer_descs([(i * step, step, self._descriptor) for i in order], "FILE")
        transfer = agent.initialize_xfer(operation, memory, slab, "ceiling", backends=["POSIX"])
        state = agent.transfer(transfer)
        while state == "PROC":
            state = agent.check_xfer_state(transfer)
        seconds = time.perf_counter() - start
        agent.release_xfer_handle(transfer)
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")
        return seconds


def build() -> dict[str, Any]:
    file, block_bytes, count = sys.argv[1:]
    turns = PosixTurns(file, int(block_bytes), int(count))
    return {"read": turns.read, "write": turns.write}


if __name__ == "__main__":
    serve(build)

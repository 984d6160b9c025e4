"""A process that finds a full NVMe directory, opens it, and serves a prompt from it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.workers.lines import serve


def build() -> dict[str, Any]:
    started = time.perf_counter()
    import kvstore
    from benchmarks import blocks, restart

    open_store = kvstore.open  # importing is lazy: now it is done
    seconds = time.perf_counter() - started
    directory, count = Path(sys.argv[1]), int(sys.argv[2])

    def serve_prompt(prompt: int) -> float:
        """Seconds from opening the store until every block of a prompt can be read."""
        chain = blocks.chain(restart.PROMPT, prompt)
        start = time.perf_counter()
        store = open_store(
            ram_bytes=64 << 20, nvme_path=directory, nvme_bytes=restart.capacity_bytes(count)
        )
        with store.acquire(chain) as lease:
            ready = lease.wait()
            taken = time.perf_counter() - start
        if ready != len(chain) or store.stats().nvme["blocks"] != count:
            raise RuntimeError(f"{ready} of {len(chain)} blocks came; {store.stats().nvme}")
        return taken

    return {"imported": lambda: seconds, "serve": serve_prompt}


if __name__ == "__main__":
    serve(build)

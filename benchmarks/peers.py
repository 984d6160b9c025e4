"""Where the peers live: an environment each, because no two of them agree on their packages."""

from __future__ import annotations

import os
from pathlib import Path

from kvstore.bench.rows import NotHereError

ROOT = Path(__file__).parents[1]


def python_of(peer: str) -> Path:
    """The interpreter of `peer` ("lmcache", "vllm", "nixl", "redis", "mooncake").

    Named by KVSTORE_BENCH_<PEER>_PYTHON, or where `make bench-peers` puts it.
    Raises NotHereError where there is none.
    """
    variable = f"KVSTORE_BENCH_{peer.upper()}_PYTHON"
    named = os.environ.get(variable)
    python = Path(named) if named else ROOT / f".venv-peers/{peer}/bin/python"
    if not python.exists():
        raise NotHereError(f"{peer} is not installed: make bench-peers, or set {variable}")
    return python

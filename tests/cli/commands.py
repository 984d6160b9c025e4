"""Commands as a person runs them: in a process of their own, or in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from kvstore.hashing import TokenChain
from kvstore.identity import Namespace
from kvstore.verbs import Store


class Done(NamedTuple):
    status: int
    stdout: str
    stderr: str

    @property
    def data(self) -> Any:
        """What `--json` printed; anything else on stdout is an error."""
        return json.loads(self.stdout)


def environment(home: Path, **extra: str) -> dict[str, str]:
    """This process's, with a home of its own and no settings."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("KVSTORE_", "XDG_"))}
    return {**inherited, "HOME": str(home), "COLUMNS": "100", **extra}


def kvstore(home: Path, *args: str, stdin: str = "", **extra: str) -> Done:
    """Run `kvstore args` in a new process, with `home` as home and working directory."""
    done = subprocess.run(
        [sys.executable, "-m", "kvstore", *args],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=home,
        env=environment(home, **extra),
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def namespace(model: str = "a model") -> Namespace:
    """Blocks of 8 KiB."""
    return Namespace(
        model=model,
        weights="w",
        tokenizer="t",
        kv_dtype="float32",
        layers=2,
        kv_heads=2,
        head_dim=16,
        block_tokens=16,
        rope="theta=10000",
    )


def fill(store: Store, blocks: int, model: str = "a model") -> TokenChain:
    """Commit a prompt of so many blocks; each block's bytes are its number."""
    chain = TokenChain(namespace(model), range(16 * blocks))
    with store.reserve(chain.chain()) as reservation:
        for index, view in zip(reservation.indices, reservation.views, strict=True):
            view[:] = bytes([index % 256]) * len(view)
        reservation.commit()
    return chain

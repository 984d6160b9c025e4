"""The process that is killed: a tiny model answers prompts over a small store.

`python -m tests.kill.worker` loads torch and the model once, and forks a child for
every line of orders on stdin. What the children do they say on stdout, a line at a
time and at the moment they do it, so that whoever reads can tell what a child was
in the middle of when it died.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch

import kvstore
from kvstore.engine.engine import Engine
from kvstore.engine.loading import LoadedModel, load
from kvstore.engine.sampling import SamplingParams
from kvstore.hashing import TokenChain
from kvstore.retention import Retention
from kvstore.store import BlockStore
from kvstore.tiers.blockfile import BlockFile
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_records import RecordFile
from kvstore.tiers.nvme_slab import Slab
from kvstore.tiers.ram import RamTier
from kvstore.verbs import Store
from tests.engine.reference import sources
from tests.engine.tiny import tiny_model
from tests.kill.workload import (
    ANSWER_TOKENS,
    BLOCK_TOKENS,
    HBM_BYTES,
    NVME_BYTES,
    PROMPTS,
    RAM_BYTES,
    MiB,
    Orders,
)

GREEDY = SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True)
HANGS_S = 120.0

TRACED: list[tuple[type, str, str]] = [
    (NvmeTier, "__init__", "open"),
    (Slab, "close", "close"),
    (BlockFile, "write", "slab.write"),
    (BlockFile, "read", "slab.read"),
    (RecordFile, "_open_databases", "records.open"),
    (RecordFile, "put", "records.put"),
    (RecordFile, "delete", "records.delete"),
    (RecordFile, "remember", "records.remember"),
]


def say(*words: object) -> None:
    """One line, from any thread, whole. Nobody to hear it: nothing left to do."""
    try:
        os.write(1, (" ".join(map(str, words)) + "\n").encode())
    except OSError:
        os._exit(1)


def trace(owner: type, method: str, what: str) -> None:
    """Have `method` say when it begins and when it has ended."""
    original: Callable[..., Any] = getattr(owner, method)

    @wraps(original)
    def traced(*args: Any, **kwargs: Any) -> Any:
        say("begin", what)
        result = original(*args, **kwargs)
        say("end", what)
        return result

    setattr(owner, method, traced)


def engine_over(model: LoadedModel, store: Store | None) -> Engine:
    """One block in one step: the same bits, whatever was found and whatever computed."""
    return Engine(
        model,
        store=store,
        hbm_bytes=HBM_BYTES,
        block_tokens=BLOCK_TOKENS,
        max_batch=1,
        prefill_chunk_tokens=BLOCK_TOKENS,
    )


def answer(engine: Engine, number: int) -> list[int]:
    """The tokens of prompt and answer."""
    (output,) = engine.generate([PROMPTS[number]], GREEDY)
    tokens = ",".join(map(str, output.token_ids))
    say("answer", number, tokens, ",".join(map(str, sources(output.usage))))
    return [*PROMPTS[number], *output.token_ids]


def tell_reference(model: LoadedModel) -> None:
    """Every answer without a cache, and every block as it is without interruption."""
    with engine_over(model, None) as engine:
        for number in range(len(PROMPTS)):
            answer(engine, number)
            engine.clear_hbm()
    with BlockStore(RamTier(64 * MiB)) as store, engine_over(model, store) as engine:
        for number in range(len(PROMPTS)):
            chain = TokenChain(engine.namespace, answer(engine, number)).chain()
            with store.acquire(chain) as lease:
                for key, view in zip(chain.keys, lease.views, strict=False):
                    say("block", key.hex(), hashlib.sha256(view).hexdigest())


def generate(model: LoadedModel, orders: Orders) -> None:
    """Answer, evict, retain; close and open again now and then."""
    random = Random(orders.seed)
    questions = list(orders.questions)
    while True:
        store = kvstore.open(
            ram_bytes=RAM_BYTES,
            nvme_path=Path(orders.directory),
            nvme_bytes=NVME_BYTES,
            nvme_driver=orders.driver,
            nvme_codec=orders.codec,
            nvme_durability=orders.durability,
        )
        with store, engine_over(model, store) as engine:
            for inode in memory():
                say("memory", inode)
            if questions:
                for number in questions:
                    answer(engine, number)
                return
            for _ in range(random.randint(1, 15)):
                answer(engine, random.randrange(len(PROMPTS)))
                disturb(engine, store, random)


def disturb(engine: Engine, store: BlockStore, random: Random) -> None:
    """What else happens to a store, now and then."""
    chain = TokenChain(engine.namespace, random.choice(PROMPTS)).chain()
    what = random.randrange(8)
    if what == 0:
        store.evict(chain)
    elif what == 1:
        store.retain(chain, Retention(priority=random.choice([20, 50]), ttl_s=0.2))
    elif what == 2:
        store.flush()
    elif what == 3:
        store.prefetch(chain)


def memory() -> set[str]:
    """Inodes of the shared memory that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "/memfd:kvstore" in line}


def child(model: LoadedModel, line: str) -> None:
    """Carry out one line, and end the process."""
    status = 1
    try:
        faulthandler.dump_traceback_later(HANGS_S, exit=True)
        say("pid", os.getpid())
        if line.strip() == "reference":
            tell_reference(model)
        else:
            for traced in TRACED:
                trace(*traced)
            generate(model, Orders.from_json(line))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        path = tiny_model(Path(folder) / "tiny", num_key_value_heads=4, head_dim=64)
        model = load(path, torch.float32)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            child(model, line)
        _, status = os.waitpid(pid, 0)
        say("ended", os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()

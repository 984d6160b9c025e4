"""kill -9 of a generating process, at any point: what it left is sound, found, and right."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from kvstore.cli.main import run as kvstore
from kvstore.frame import names
from kvstore.hashing import TokenChain
from kvstore.tier import ReadRequest
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_verify import DirectorySummary, read_directory
from tests.kill.victims import ROOT, Aim, Run, Workers
from tests.kill.workload import BLOCK_TOKENS, NVME_BYTES, PROMPTS, Orders

KILLS = 10  # of one directory, one after the other
# "" is whatever begins.
AIMS = (*("", "slab.write", "records.put") * 2, "records.delete", "slab.read", "close", "open")
RARE = ("close", "open")
LONGEST_SPIN_S = 0.003


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers() as workers:
        yield workers


@pytest.fixture(scope="module")
def reference(workers: Workers) -> Run:
    """The answers with the cache off, and the blocks of a run that nothing interrupted."""
    run = workers.reference()
    assert run.status == 0
    cold, cached = run.answers[: len(PROMPTS)], run.answers[len(PROMPTS) :]
    assert [answer.tokens for answer in cold] == [answer.tokens for answer in cached]
    assert all(answer.sources[-1] == len(PROMPTS[answer.number]) for answer in cold)
    return run


@pytest.mark.parametrize("seed", range(2))
def test_twenty_kills(workers: Workers, reference: Run, tmp_path: Path, seed: int) -> None:
    campaign(workers, reference, tmp_path / "nvme", seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 12))
def test_a_hundred_kills(workers: Workers, reference: Run, tmp_path: Path, seed: int) -> None:
    campaign(workers, reference, tmp_path / "nvme", seed)


def campaign(workers: Workers, reference: Run, directory: Path, seed: int) -> None:
    """Kill, look, ask again, and so on, always over the same directory."""
    random = Random(seed)
    caught, reused_tokens = 0, 0
    for _ in range(KILLS):
        orders = draw_orders(random, directory)
        run = kill(workers, reference, orders, draw_aim(random))
        caught += bool(run.in_flight)
        check_sound(directory)
        reused_tokens += check_reuse(workers, reference, orders)
        check_bytes(directory, reference)
    # Otherwise the kills hit nothing, and prove nothing.
    assert caught >= KILLS // 2
    assert reused_tokens > 0
    check_command(directory)


@pytest.mark.parametrize("seed", range(6))
def test_killed_while_the_directory_is_made(
    workers: Workers, reference: Run, tmp_path: Path, seed: int
) -> None:
    """Either it is no kvstore directory yet, or it is a sound one; it can be opened, too."""
    random = Random(seed)
    orders = draw_orders(random, tmp_path / "nvme")
    what, nth = random.choice([("open", 1), ("records.open", 1), ("records.open", 2)])
    kill(workers, reference, orders, Aim(what, nth, random.uniform(0, 0.01)))
    if (tmp_path / "nvme" / "format").exists():
        check_sound(tmp_path / "nvme")
    run = workers.run(replace(orders, questions=(1, 1)))
    assert run.status == 0
    check_answers(run, reference)
    check_bytes(tmp_path / "nvme", reference)


def kill(workers: Workers, reference: Run, orders: Orders, aim: Aim) -> Run:
    """One run that ends by SIGKILL; what it said until then is right, and its memory is gone."""
    run = workers.run(orders, aim)
    print(f"{aim}: in flight {dict(run.in_flight)}, {orders}")
    assert run.status == -signal.SIGKILL
    check_answers(run, reference)
    assert holders(run.memory) == []
    return run


def draw_orders(random: Random, directory: Path) -> Orders:
    return Orders(
        seed=random.randrange(1 << 30),
        directory=str(directory),
        driver=random.choice(["auto", "auto", "threads"]),
        codec=random.choice(["raw", "raw", "zstd"]),
        durability=random.choice(["cache", "cache", "sync"]),
    )


def draw_aim(random: Random) -> Aim:
    what = random.choice(AIMS)
    nth = random.randint(1, 3 if what in RARE else 30)
    # Most of what can be hit is over in a fraction of a millisecond.
    return Aim(what, nth, LONGEST_SPIN_S * random.random() ** 3)


def check_answers(run: Run, reference: Run) -> None:
    """Every answer is that of the model without a cache, and every token accounted for."""
    for answer in run.answers:
        assert answer.tokens == reference.answers[answer.number].tokens
        assert sum(answer.sources) == len(PROMPTS[answer.number])


def check_sound(directory: Path) -> None:
    """`kvstore verify` finds nothing wrong, before anyone has opened what the dead one left."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        status = kvstore(["verify", "--json", str(directory)])
    report = json.loads(printed.getvalue())
    assert (status, report["ok"], report["findings"]) == (0, True, [])
    summary = read_directory(directory)
    assert summary.allocated_bytes <= NVME_BYTES
    assert report["blocks"] == summary.blocks


def check_reuse(workers: Workers, reference: Run, orders: Orders) -> int:
    """The next process opens at once, and loads whatever is there; returns how many tokens."""
    summary = read_directory(Path(orders.directory))
    loadable = [BLOCK_TOKENS * leading_blocks(prompt, summary) for prompt in PROMPTS]
    best = sorted(range(len(PROMPTS)), key=lambda number: loadable[number], reverse=True)
    run = workers.run(replace(orders, questions=tuple(best[:3])))
    assert run.status == 0
    check_answers(run, reference)
    assert len(run.answers) == 3
    _, _, nvme_tokens, _, _ = run.answers[0].sources
    assert nvme_tokens == loadable[best[0]]
    return nvme_tokens


def leading_blocks(prompt: list[int], summary: DirectorySummary) -> int:
    """How many blocks of a prompt, from its beginning, are on the drive and of use."""
    held = set(names(summary.records["key"]))
    namespaces = [each.namespace for each in summary.namespaces if each.namespace]
    if not namespaces:
        return 0
    keys = TokenChain(namespaces[0], prompt[:-1]).chain().keys
    return next((n for n, key in enumerate(keys) if key not in held), len(keys))


def check_bytes(directory: Path, reference: Run) -> None:
    """Every block that the tier serves is, byte for byte, that of the uninterrupted run."""
    records = read_directory(directory).records
    assert len(records)
    tier = NvmeTier(directory, NVME_BYTES)
    try:
        tier.check_invariants()
        counters = tier.stats()
        assert counters["blocks"] == len(records)
        assert not counters.get("dropped_records")
        assert not counters.get("record_files_lost")
        buffers = [memoryview(bytearray(size)) for size in records["raw_bytes"].tolist()]
        requests = [
            ReadRequest(key, namespace, len(buffer), buffer)
            for key, namespace, buffer in zip(
                names(records["key"]), names(records["namespace"]), buffers, strict=True
            )
        ]
        for request, result in zip(requests, asyncio.run(tier.read(requests)), strict=True):
            assert result.miss is None
            digest = hashlib.sha256(request.buffer).hexdigest()
            assert digest == reference.blocks[request.key]
    finally:
        tier.close_now()


def check_command(directory: Path) -> None:
    """As a person would run it."""
    done = subprocess.run(
        [sys.executable, "-m", "kvstore", "verify", "--json", str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["ok"]


def holders(inodes: Collection[int]) -> list[str]:
    """Who still has shared memory of these inodes mapped or open; and our names in /dev/shm."""
    found = [name for name in os.listdir("/dev/shm") if name.startswith("kvstore")]
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            lines = (process / "maps").read_text().splitlines()
            mapped = (line.split() for line in lines if "/memfd:kvstore" in line)
            found += [f"{process} maps {fields}" for fields in mapped if int(fields[4]) in inodes]
            found += [str(path) for path in (process / "fd").iterdir() if is_held(path, inodes)]
    return found


def is_held(descriptor: Path, inodes: Collection[int]) -> bool:
    try:
        target = os.readlink(descriptor)
        return "/memfd:kvstore" in target and descriptor.stat().st_ino in inodes
    except OSError:  # closed meanwhile
        return False

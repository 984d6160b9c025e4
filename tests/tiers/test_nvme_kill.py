"""kill -9 at every step of a write, an eviction and a delete; then it is opened again."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_verify import verify
from tests.tiers.subjects import CAPACITY_BYTES, content, get, item, run

ROOT = Path(__file__).parents[2]
BLOCKS = 60  # a round; rounds overlap, so that blocks are written, evicted and written again
NBYTES = 50_000

# Writes until it dies: at the `count`-th pass of a point, or when its parent kills it.
CHILD = """
import asyncio, os, signal, sys
from pathlib import Path
from kvstore.tiers import blockfile, nvme_records
from kvstore.tiers.nvme import NvmeTier
from tests.tiers.subjects import CAPACITY_BYTES, MODEL, item, key
from tests.tiers.test_nvme_kill import BLOCKS, NBYTES
path, point, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
where, _, when = point.partition(" ")

def wrap(owner, name):
    inner = getattr(owner, name)
    def outer(*args, **kwargs):
        global count
        count -= 1
        if count == 0 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = inner(*args, **kwargs)
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, outer)

points = {"bytes": (blockfile.BlockFile, "write"), "put": (nvme_records.RecordFile, "put"),
          "delete": (nvme_records.RecordFile, "delete")}
if where in points:
    wrap(*points[where])

async def main():
    tier = NvmeTier(path, CAPACITY_BYTES)
    await tier.remember([MODEL])
    print("ready", flush=True)
    for round in range(10**9):
        numbers = [round * BLOCKS // 2 + n for n in range(BLOCKS)]
        await tier.write([item(n % 500, NBYTES, last_use_s=float(n)) for n in numbers])
        await tier.delete([key(n % 500) for n in numbers[::7]])
asyncio.run(main())
"""


def start(path: Path, point: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), point, str(count)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def check(path: Path) -> int:
    """Nothing is wrong, and every byte served is right; how many blocks are there."""
    assert [f for step in verify(path) for f in step.findings] == []

    async def body() -> int:
        tier = NvmeTier(path, CAPACITY_BYTES)
        tier.check_invariants()
        assert tier.stats()["dropped_records"] == 0
        found = 0
        for n in range(700):
            result, data = await get(tier, n, NBYTES)
            if result.miss is None:
                assert data == content(n, NBYTES)
                found += 1
        assert found == tier.stats()["blocks"]
        await tier.write([item(n, NBYTES) for n in range(600, 700)])
        tier.check_invariants()
        await tier.close()
        return found

    return run(body())


@pytest.mark.parametrize(
    "point",
    [f"{where} {when}" for where in ("bytes", "put", "delete") for when in ("before", "after")],
)
@pytest.mark.parametrize("count", [1, 4])
def test_killed_at_a_step(point: str, count: int, tmp_path: Path) -> None:
    with start(tmp_path, point, count) as child:
        _, errors = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, errors
    found = check(tmp_path)
    assert found > 0 or count == 1


def killed_at_random(path: Path, chance: random.Random) -> None:
    with start(path, "never", 0) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=chance.random() * 0.25)
        child.kill()
        _, errors = child.communicate()
    assert child.returncode == -signal.SIGKILL, errors
    assert check(path) >= 0


def test_killed_at_random_points(tmp_path: Path) -> None:
    """Again and again in one directory."""
    chance = random.Random(1)
    for _ in range(5):
        killed_at_random(tmp_path, chance)


@pytest.mark.soak
def test_killed_at_many_random_points(tmp_path: Path) -> None:
    chance = random.Random(2)
    for _ in range(100):
        killed_at_random(tmp_path, chance)

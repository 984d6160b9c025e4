"""What an NVMe directory still knows when it is opened again, whatever happened between."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvstore.frame import pack_record
from kvstore.tier import Miss, Record
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_records import Put
from tests.tiers.subjects import (
    CAPACITY_BYTES,
    MODEL,
    NAMESPACE,
    content,
    extent,
    flip_in_file,
    get,
    item,
    key,
    request,
    run,
)


async def fill(path: Path, blocks: int, capacity_bytes: int = CAPACITY_BYTES) -> None:
    tier = NvmeTier(path, capacity_bytes)
    for n in range(blocks):
        await tier.write([item(n, last_use_s=float(n))])
    await tier.close()


async def served(path: Path, blocks: int, capacity_bytes: int = CAPACITY_BYTES) -> list[int]:
    """Opens the directory; numbers of the blocks that it serves. A wrong byte fails."""
    tier = NvmeTier(path, capacity_bytes)
    numbers = []
    for n in range(blocks):
        result, data = await get(tier, n)
        if result.miss is None:
            assert data == content(n, 8192)
            numbers.append(n)
    tier.check_invariants()
    await tier.close()
    return numbers


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_blocks_records_and_namespaces_come_back(codec: str, tmp_path: Path) -> None:
    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES, codec=codec)  # type: ignore[arg-type]
        await tier.remember([MODEL])
        await tier.write(
            [item(n, 1000 * n, parent=key(n - 1), priority=n, created_s=5.0) for n in range(1, 60)]
        )
        before = [(await get(tier, n, 1000 * n))[0].record for n in range(1, 60)]
        await tier.delete([key(3)])
        await tier.close()
        # Another codec writes differently, and reads what is there.
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        tier.check_invariants()
        assert dict(tier.namespaces()) == {MODEL.fingerprint: MODEL}
        assert tier.protected_bytes(NAMESPACE) == sum(r.stored_bytes for r in before[35:] if r)
        for n in range(1, 60):
            result, data = await get(tier, n, 1000 * n)
            if n == 3:
                assert result.miss is Miss.ABSENT
                continue
            assert data == content(n, 1000 * n)
            assert result.record is not None
            old = before[n - 1]
            assert old is not None
            for field in ("key", "parent", "codec", "stored_bytes", "checksum", "priority"):
                assert getattr(result.record, field) == getattr(old, field), field
        await tier.close()

    run(body())


def test_order_of_use_comes_back(tmp_path: Path) -> None:
    async def body() -> None:
        now = [100.0]
        tier = NvmeTier(tmp_path, CAPACITY_BYTES, now_s=lambda: now[0])
        nbytes = CAPACITY_BYTES // 16
        await tier.write([item(n, nbytes, last_use_s=50.0 + n) for n in range(12)])
        tier.touch([key(2)])
        now[0] = 101.0
        await get(tier, 0, nbytes)
        await tier.close()
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        room = tier.stats()["capacity_bytes"] - tier.stats()["used_bytes"]
        more = room // nbytes + 10
        await tier.write([item(n, nbytes) for n in range(100, 100 + more)])
        assert tier.peek([key(n) for n in range(12)]) == [n in (0, 2) for n in range(12)]
        await tier.close()

    run(body())


def test_retention_comes_back(tmp_path: Path) -> None:
    async def body() -> None:
        now = [100.0]
        tier = NvmeTier(tmp_path, CAPACITY_BYTES, now_s=lambda: now[0])
        await tier.write([item(n) for n in range(4)])
        assert await tier.retain([key(0), key(1), key(9)], 90, 0.0) == 2
        assert await tier.retain([key(2)], 80, 200.0) == 1
        await tier.close()

        tier = NvmeTier(tmp_path, CAPACITY_BYTES, now_s=lambda: now[0])
        records = [(await get(tier, n))[0].record for n in range(4)]
        assert [r.priority for r in records if r] == [90, 90, 80, 35]
        assert [r.expires_s for r in records if r] == [0.0, 0.0, 200.0, 0.0]
        assert tier.protected_bytes(NAMESPACE) == 3 * 8192
        now[0] = 201.0
        big = tier.stats()["capacity_bytes"]
        await tier.write([item(50, big)])  # what is above default priority does not make room
        assert tier.peek([key(n) for n in range(4)]) == [True, True, False, False]
        await tier.close()

    run(body())


@pytest.mark.parametrize("kept", [0.3, 0.5, 0.99])
def test_a_smaller_capacity_keeps_what_fits(kept: float, tmp_path: Path) -> None:
    async def body() -> None:
        await fill(tmp_path, 400)
        smaller = int(kept * CAPACITY_BYTES)
        numbers = await served(tmp_path, 400, smaller)
        assert len(numbers) * 8192 > 0.4 * smaller
        assert disk_bytes(tmp_path) <= smaller
        assert await served(tmp_path, 400, smaller) == numbers
        # And larger again: all of these, and room for more.
        assert await served(tmp_path, 400, 2 * CAPACITY_BYTES) == numbers
        assert CAPACITY_BYTES < disk_bytes(tmp_path) <= 2 * CAPACITY_BYTES
        await fill(tmp_path, 400, 2 * CAPACITY_BYTES)
        assert await served(tmp_path, 400, 2 * CAPACITY_BYTES) == list(range(400))

    run(body())


def disk_bytes(folder: Path) -> int:
    """As `du` counts: blocks of the folder and of all that is in it."""
    return 512 * sum(os.lstat(path).st_blocks for path in (folder, *folder.rglob("*")))


@pytest.mark.parametrize("length", [0, 1, 4096 * 20, 4096 * 20 + 1000])
def test_a_slab_cut_short_between_two_runs(length: int, tmp_path: Path) -> None:
    async def body() -> None:
        await fill(tmp_path, 50)
        os.truncate(tmp_path / "slab", length)
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        results = await tier.read([request(n) for n in range(50)])
        lost = sum(result.miss is Miss.CHECKSUM for result in results)
        assert lost == 50 - length // 8192
        assert tier.stats()["misses_checksum"] == lost
        await tier.write([item(n) for n in range(50)])
        await tier.close()
        assert await served(tmp_path, 50) == list(range(50))

    run(body())


def test_a_slab_cut_short_under_a_running_tier(tmp_path: Path) -> None:
    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        await tier.write([item(n) for n in range(50)])
        os.truncate(tmp_path / "slab", 10 * 8192 + 5000)
        results = await tier.read([request(n) for n in range(50)])
        assert [r.miss for r in results] == [None] * 10 + [Miss.CHECKSUM] * 40
        assert tier.stats()["unreadable_blocks"] == 40
        assert tier.stats()["blocks"] == 10
        tier.check_invariants()
        await tier.write([item(n) for n in range(10, 50)])  # the file grows again
        results = await tier.read([request(n) for n in range(50)])
        assert [r.miss for r in results] == [None] * 50
        await tier.close()

    run(body())


def test_a_lost_slab_costs_the_blocks_and_nothing_else(tmp_path: Path) -> None:
    async def body() -> None:
        await fill(tmp_path, 30)
        (tmp_path / "slab").unlink()
        assert await served(tmp_path, 30) == []
        await fill(tmp_path, 30)
        assert await served(tmp_path, 30) == list(range(30))

    run(body())


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_every_bit_of_a_block_counts(codec: str, tmp_path: Path) -> None:
    """One bit at a time, in the first, the last and sampled bytes of the stored block."""

    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES, codec=codec)  # type: ignore[arg-type]
        for trial in range(120):
            await tier.write([item(1, 3000), item(2, 3000)])
            offset, nbytes = extent(tier, key(1))
            bits = 8 * nbytes
            bit = trial if trial < 40 else bits - 1 - (trial * 7919) % bits
            flip_in_file(tmp_path / "slab", offset, bit)
            results = await tier.read([request(1, 3000), request(2, 3000)])
            assert [r.miss for r in results] == [Miss.CHECKSUM, None], bit
        assert tier.stats()["misses_checksum"] == 120
        await tier.close()

    run(body())


def damage(what: str) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        os.truncate(path, 3 * 4096 + 100)

    def empty(path: Path) -> None:
        os.truncate(path, 0)

    def zero(path: Path) -> None:
        path.write_bytes(bytes(path.stat().st_size))

    def foreign(path: Path) -> None:
        path.write_bytes(os.urandom(100_000))

    def gone(path: Path) -> None:
        path.unlink()

    return {"cut": cut, "empty": empty, "zero": zero, "foreign": foreign, "gone": gone}[what]


@pytest.mark.parametrize("what", ["cut", "empty", "zero", "foreign", "gone"])
def test_records_that_cannot_be_followed_are_begun_anew(what: str, tmp_path: Path) -> None:
    async def body() -> None:
        await fill(tmp_path, 30)
        damage(what)(tmp_path / "records.mdb")
        assert await served(tmp_path, 30) == []
        await fill(tmp_path, 30)
        assert await served(tmp_path, 30) == list(range(30))

    run(body())


def test_a_flipped_bit_in_a_record_costs_that_block(tmp_path: Path) -> None:
    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        await tier.write([item(n) for n in range(30)])
        await tier.close()
        path = tmp_path / "records.mdb"
        whole = path.read_bytes()
        for n in (0, 11, 29):
            copy = tmp_path / f"copy{n}"
            shutil.copytree(tmp_path, copy, ignore=shutil.ignore_patterns("copy*"))
            for found in re.finditer(re.escape(key(n)), whole):  # a split page leaves a copy
                flip_in_file(copy / "records.mdb", found.start(), n)
            assert await served(copy, 30) == [i for i in range(30) if i != n]
            # It is gone for good: the next start finds nothing wrong.
            tier = NvmeTier(copy, CAPACITY_BYTES)
            assert tier.stats()["dropped_records"] == 0
            await tier.close()

    run(body())


def test_records_that_contradict_each_other(tmp_path: Path) -> None:
    """Of two that overlap the first stays; of two with one key the last used; absurd ones go."""

    async def body() -> None:
        await fill(tmp_path, 3)
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)

        def forged(n: int, offset: int, nbytes: int = 8192, used_s: float = 0.0) -> Put:
            record = Record(
                NAMESPACE, key(n), NAMESPACE, nbytes, stored_bytes=nbytes, checksum=1,
                last_use_s=used_s,
            )  # fmt: skip
            return Put(offset, pack_record(record, offset))

        tier._slab.records.put(
            [
                forged(10, 4096, 4096),  # within block 0
                forged(1, 40 * 4096),  # block 1 again, longer ago
                forged(11, 1 << 40),  # beyond the end
                forged(12, (1 << 63) + 4096),
                forged(13, 50 * 4096, (1 << 64) - 1),
                forged(14, 60 * 4096 + 1),  # misaligned
                Put(70 * 4096, forged(15, 80 * 4096).record),  # under another's offset
                Put(90 * 4096, b"short"),
            ]
        )
        await tier.close()
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        assert tier.stats()["dropped_records"] == 8
        tier.check_invariants()
        await tier.close()
        assert await served(tmp_path, 20) == [0, 1, 2]

    run(body())


def test_more_records_than_there_is_room_for(tmp_path: Path) -> None:
    """The least recently used go, when a capacity with fewer rows is given."""

    async def body() -> None:
        tier = NvmeTier(tmp_path, 16 << 20)
        blocks = 1500
        await tier.write([item(n, 100, last_use_s=float(n)) for n in range(blocks)])
        assert tier.stats()["blocks"] == blocks
        await tier.close()
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        limit = tier.stats()["max_blocks"]
        assert limit < blocks
        held = np.array(tier.peek([key(n) for n in range(blocks)]))
        # Those that lie beyond the smaller slab go as well.
        assert 0 < held.sum() <= limit
        tier.check_invariants()
        await tier.close()

    run(body())

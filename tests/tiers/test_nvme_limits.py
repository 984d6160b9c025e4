"""A drive that is full, fails or is small: other blocks go on, and no bound is broken."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore.errors import TierFullError
from kvstore.identity import Namespace
from kvstore.tier import Miss, Refusal
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_records import Put, RecordFile
from kvstore.tiers.nvme_verify import verify
from tests.tiers.subjects import (
    CAPACITY_BYTES,
    MODEL,
    content,
    extent,
    get,
    item,
    key,
    request,
    run,
)
from tests.tiers.test_nvme_restart import disk_bytes


@contextmanager
def no_file_grows_beyond(nbytes: int) -> Iterator[None]:
    """The kernel fails writes past this offset of any file, with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_memory_beyond(nbytes: int) -> Iterator[None]:
    """The kernel maps no more than this besides what the process has."""
    status = Path("/proc/self/status").read_text()
    mapped = int(status.partition("VmSize:")[2].split()[0]) << 10
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("driver", ["auto", "threads"])
def test_a_medium_that_refuses_writes_still_serves(driver: str, tmp_path: Path) -> None:
    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES, driver=driver)  # type: ignore[arg-type]
        await tier.remember([MODEL])
        await tier.write([item(n) for n in range(100)])
        with no_file_grows_beyond(1 << 20):
            results = await tier.write([item(n) for n in range(100, 200)])
        refusals = [r.refusal for r in results]
        stored = refusals.count(None)
        assert stored == (1 << 20) // 8192 - 100
        assert refusals == [None] * stored + [Refusal.IO_ERROR] * (100 - stored)
        stats = tier.stats()
        assert stats["read_only"] == 1
        assert stats["failures_efbig"] == 1
        assert stats["write_errors"] == 100 - stored
        # From here on nothing is written, and everything is served.
        assert [r.refusal for r in await tier.write([item(500), item(1)])] == [
            Refusal.READ_ONLY,
            None,
        ]
        for n in range(100 + stored):
            assert (await get(tier, n))[1] == content(n, 8192)
        assert await tier.delete([key(0)]) == 1
        tier.check_invariants()
        await tier.close()
        assert not [f for step in verify(tmp_path) for f in step.findings]
        # After the cause is gone, opening it again is all it takes.
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        assert [r.refusal for r in await tier.write([item(150)])] == [None]
        await tier.close()

    run(body())


def test_a_warm_directory_on_a_disk_where_no_file_may_be_written(tmp_path: Path) -> None:
    """It opens, though a record must go and the process's id cannot be noted, and it serves."""

    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        await tier.remember([MODEL])
        await tier.write([item(n) for n in range(20)])
        last = extent(tier, key(19))[0]
        await tier.close()
        path = tmp_path / "records.mdb"
        records = RecordFile(path, path.stat().st_size)
        records.put([Put(last, b"not a record any more")])
        records.close()
        with no_file_grows_beyond(0):
            tier = NvmeTier(tmp_path, CAPACITY_BYTES)
            assert tier.stats()["dropped_records"] == 1
            for n in range(19):
                assert (await get(tier, n))[1] == content(n, 8192)
            results = await tier.write([item(n) for n in range(30, 33)])
            assert {r.refusal for r in results} == {Refusal.READ_ONLY}
            assert tier.stats()["refused_read_only"] == 3
            assert tier.stats()["failures_records"] == 1
            await tier.close()

    run(body())


def test_a_full_device(tmp_path: Path) -> None:
    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        await tier.write([item(1)])
        full = os.open("/dev/full", os.O_RDWR)
        os.dup2(full, tier._slab.file._fd)
        os.close(full)
        results = await tier.write([item(n) for n in range(2, 5)])
        assert [r.refusal for r in results] == [Refusal.IO_ERROR] * 3
        assert tier.stats()["failures_enospc"] == 1
        assert (await get(tier, 1))[0].miss is Miss.CHECKSUM  # the device reads as zeros
        tier.check_invariants()
        await tier.close()

    run(body())


def test_records_that_cannot_be_written(tmp_path: Path) -> None:
    """Neither is anything visible that is not recorded, nor an extent used that still is."""

    async def body() -> None:
        nbytes = CAPACITY_BYTES // 16
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        await tier.remember([MODEL])
        await tier.write([item(n, nbytes) for n in range(13)])
        held = tier.stats()["blocks"]
        slab = (tmp_path / "slab").read_bytes()
        with no_file_grows_beyond(4096):
            results = await tier.write([item(n, nbytes) for n in range(50, 53)])
        assert {r.refusal for r in results} == {Refusal.FULL}  # eviction could not be recorded
        assert tier.stats()["failures_records"] == 1
        assert (tmp_path / "slab").read_bytes() == slab
        tier.check_invariants()
        await tier.close()
        # The evicted are back: their records were never deleted.
        assert not [f for step in verify(tmp_path) for f in step.findings]
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        assert tier.stats()["blocks"] == held
        await tier.close()

    run(body())


def test_a_commit_that_fails_leaves_nothing_visible(tmp_path: Path) -> None:
    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        await tier.write([item(n) for n in range(5)])
        await asyncio.sleep(0)
        put = tier._slab.records.put

        def fails(*args: object) -> None:
            with no_file_grows_beyond(4096):
                put(*args)  # type: ignore[arg-type]

        tier._slab.records.put = fails  # type: ignore[method-assign, assignment]
        results = await tier.write([item(n) for n in range(5, 9)])
        assert {r.refusal for r in results} == {Refusal.IO_ERROR}
        assert tier.peek([key(n) for n in range(9)]) == [True] * 5 + [False] * 4
        tier.check_invariants()
        await tier.close()

    run(body())


def test_a_flush_that_fails_leaves_nothing_visible(tmp_path: Path) -> None:
    """/dev/null takes every write and knows no flush."""

    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES, durability="sync")
        await tier.write([item(1)])
        used_bytes = tier.stats()["used_bytes"]
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, tier._slab.file._fd)
        os.close(null)
        results = await tier.write([item(2), item(3)])
        assert {r.refusal for r in results} == {Refusal.IO_ERROR}
        assert tier.peek([key(n) for n in range(1, 4)]) == [True, False, False]
        assert tier.stats()["used_bytes"] == used_bytes
        tier.check_invariants()
        await tier.close()

    run(body())


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_memory_that_is_refused_is_not_the_end(codec: str, tmp_path: Path) -> None:
    """A block that needs memory of ours to be moved waits for better times; nothing is lost."""

    async def body() -> None:
        nbytes = (24 << 20) - 1
        tier = NvmeTier(tmp_path, 80 << 20, codec=codec)  # type: ignore[arg-type]
        await tier.remember([MODEL])
        await tier.write([item(1), item(2, nbytes)])
        await get(tier, 1)
        used_bytes = tier.stats()["used_bytes"]
        new, asked = item(3, nbytes), request(2, nbytes)
        with no_memory_beyond(8 << 20):
            if codec == "raw":
                assert (await tier.write([new]))[0].refusal is Refusal.IO_ERROR
                assert (await tier.read([asked]))[0].miss is Miss.BREAKER
            else:
                with pytest.raises(OSError, match="Cannot allocate memory"):
                    await tier.read([asked])
        assert tier.stats()["used_bytes"] == used_bytes
        assert tier.stats()["read_only"] == 0
        assert not tier._slab.table.slots.index.pins.any()
        assert (await tier.write([new]))[0].refusal is None
        assert (await get(tier, 2, nbytes))[1] == content(2, nbytes)
        tier.check_invariants()
        await tier.close()

    run(body())


def test_namespaces_are_remembered_once(tmp_path: Path) -> None:
    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        other = Namespace.from_json(MODEL.to_json().replace('"model":"m"', '"model":"other"'))
        await tier.remember([MODEL])
        await tier.remember([MODEL, other])
        with no_file_grows_beyond(4096):
            await tier.remember([MODEL])  # known: nothing is written
        assert set(tier.namespaces()) == {MODEL.fingerprint, other.fingerprint}
        await tier.close()

    run(body())


def test_namespaces_take_no_room_of_the_blocks(tmp_path: Path) -> None:
    """And when it is opened again, those that hold nothing make room for others."""
    many = [dataclasses.replace(MODEL, model="other", salt="s" * 4000 + str(n)) for n in range(99)]

    async def fill(tier: NvmeTier) -> int:
        for done, each in enumerate(many):
            try:
                await tier.remember([each])
            except TierFullError:
                return done
        return len(many)

    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        await tier.remember([MODEL])
        taken = await fill(tier)
        assert 1 < taken < len(many)
        await tier.remember([MODEL])
        room = tier.stats()["max_blocks"]
        written = await tier.write([item(number, 4096) for number in range(room)])
        assert {result.refusal for result in written} == {None}
        assert await tier.delete([key(number) for number in range(1, room)]) == room - 1
        tier.check_invariants()
        await tier.close()
        again = NvmeTier(tmp_path, CAPACITY_BYTES)
        assert set(again.namespaces()) == {MODEL.fingerprint}
        assert await fill(again) == taken
        assert (await get(again, 0, 4096))[1] == content(0, 4096)
        await again.close()

    run(body())


@pytest.mark.parametrize("capacity_bytes", [1 << 20, 3_000_000, 9 << 20])
def test_the_directory_never_exceeds_its_capacity(capacity_bytes: int, tmp_path: Path) -> None:
    """Small and large blocks come and go; the disk usage is asked for after every batch."""

    async def body() -> None:
        chance = random.Random(capacity_bytes)
        number = 0
        for _ in range(2):
            tier = NvmeTier(tmp_path, capacity_bytes)
            for _ in range(25):
                sizes = [chance.choice([100, 4096, 20_000, 120_000]) for _ in range(60)]
                if chance.random() < 0.3:
                    sizes = [10] * 600
                results = await tier.write(
                    [item(number + i, nbytes) for i, nbytes in enumerate(sizes)]
                )
                number += len(sizes)
                assert {r.refusal for r in results} <= {None, Refusal.FULL}
                await tier.delete([key(chance.randrange(number)) for _ in range(20)])
                assert disk_bytes(tmp_path) <= capacity_bytes
                stats = tier.stats()
                assert stats["used_bytes"] <= stats["capacity_bytes"]
                assert stats["blocks"] <= stats["max_blocks"]
            assert tier.stats()["read_only"] == 0
            tier.check_invariants()
            await tier.close()
            assert disk_bytes(tmp_path) <= capacity_bytes

    run(body())


def test_tiny_blocks_are_bounded_by_rows_and_evict(tmp_path: Path) -> None:
    async def body() -> None:
        tier = NvmeTier(tmp_path, 1 << 20)
        limit = tier.stats()["max_blocks"]
        tier._slab.table.max_blocks = limit = min(limit, 50)
        for first in range(0, 300, 30):
            results = await tier.write([item(n, 10) for n in range(first, first + 30)])
            assert {r.refusal for r in results} == {None}
        assert tier.stats()["blocks"] == limit
        assert tier.peek([key(n) for n in range(270, 300)]) == [True] * 30
        tier.check_invariants()
        await tier.close()

    run(body())


def test_an_extent_being_read_is_not_given_away(tmp_path: Path) -> None:
    """A write that needs room while a read is under way takes other blocks, or is refused."""

    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        nbytes = CAPACITY_BYTES // 16
        await tier.write([item(n, nbytes) for n in range(13)])
        held = [n for n in range(13) if tier.peek([key(n)]) == [True]]
        before = {n: extent(tier, key(n)) for n in held}
        read = tier._slab.file.read
        loop = asyncio.get_running_loop()
        seen: list[list[Refusal | None]] = []

        def read_slowly(blocks: object, done: object) -> None:
            writing = asyncio.run_coroutine_threadsafe(
                tier.write([item(n, nbytes) for n in range(100, 104)]), loop
            )
            seen.append([r.refusal for r in writing.result()])
            deleting = asyncio.run_coroutine_threadsafe(tier.delete([key(held[0])]), loop)
            assert deleting.result() == 1
            assert tier.peek([key(held[0])]) == [False]
            assert extent(tier, key(held[0])) == before[held[0]]
            read(blocks, done)  # type: ignore[arg-type]

        tier._slab.file.read = read_slowly  # type: ignore[method-assign]
        asked = [request(n, nbytes) for n in held]
        results = await tier.read(asked)
        assert seen == [[Refusal.FULL] * 4] or len(held) < 13
        assert [r.miss for r in results] == [None] * len(held)
        assert all(bytes(a.buffer) == content(n, nbytes) for n, a in zip(held, asked, strict=True))
        tier._slab.file.read = read  # type: ignore[method-assign]
        assert (await tier.read([request(held[0], nbytes)]))[0].miss is Miss.EVICTED
        tier.check_invariants()
        await tier.close()

    run(body())


def test_zstd_takes_less_room(tmp_path: Path) -> None:
    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES, codec="zstd")
        nbytes = CAPACITY_BYTES // 4
        blocks = [
            item(n, nbytes)._replace(buffer=memoryview(bytes([n]) * nbytes)) for n in range(20)
        ]
        assert {r.refusal for r in await tier.write(blocks)} == {None}
        assert tier.stats()["blocks"] == 20
        assert tier.stats()["used_bytes"] < nbytes
        for n in range(20):
            assert (await get(tier, n, nbytes))[1] == bytes([n]) * nbytes
        await tier.close()

    run(body())

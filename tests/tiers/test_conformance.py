"""What every tier must do. A new tier adds one line to `SUBJECTS`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import ClosedError
from kvstore.tier import Miss, ReadRequest, Refusal, Tier
from tests.tiers.subjects import (
    CAPACITY_BYTES,
    NAMESPACE,
    SUBJECTS,
    Subject,
    content,
    get,
    item,
    key,
    request,
    run,
)

Body = Callable[[Tier], Awaitable[None]]
GONE = (Miss.ABSENT, Miss.EVICTED)


@pytest.fixture(params=SUBJECTS, ids=str)
def subject(request: pytest.FixtureRequest) -> Subject:
    chosen: Subject = request.param
    return chosen


@pytest.fixture
def within(subject: Subject, tmp_path: Path) -> Callable[[Body], None]:
    """Runs a body against an empty tier, and checks its invariants at the end."""

    def runner(body: Body) -> None:
        async def work() -> None:
            tier = subject.open(tmp_path)
            try:
                await body(tier)
                check = getattr(getattr(tier, "_tier", tier), "check_invariants", None)
                assert check is not None
                check()
            finally:
                await tier.close()

        run(work())

    return runner


def test_what_is_written_is_read(within: Callable[[Body], None]) -> None:
    async def body(tier: Tier) -> None:
        written = item(1, parent=key(0), priority=70, expires_s=5e9, shard_start=2, shard_heads=1)
        assert [r.refusal for r in await tier.write([written])] == [None]
        assert await tier.contains([key(0), key(1)]) == [False, True]
        result, data = await get(tier, 1)
        assert data == content(1, 8192)
        record = result.record
        assert record is not None
        assert result.miss is None
        asked = written.record
        for field in (
            *("namespace", "key", "parent", "raw_bytes", "shard_start", "shard_heads"),
            *("priority", "expires_s", "created_s"),
        ):
            assert getattr(record, field) == getattr(asked, field), field
        assert record.checksum is not None

    within(body)


def test_what_was_never_written_is_absent(within: Callable[[Body], None]) -> None:
    async def body(tier: Tier) -> None:
        result, _ = await get(tier, 1)
        assert result == (None, Miss.ABSENT)
        assert await tier.delete([key(1)]) == 0

    within(body)


@pytest.mark.parametrize("nbytes", [1, 100, 4095, 4096, 4097, 70_001])
def test_any_length_at_any_address(nbytes: int, within: Callable[[Body], None]) -> None:
    async def body(tier: Tier) -> None:
        for shift in (0, 1, 4096):
            data = bytes(shift) + content(shift, nbytes)
            given = item(shift, nbytes)._replace(buffer=memoryview(data)[shift:])
            assert [r.refusal for r in await tier.write([given])] == [None]
            space = bytearray(shift + nbytes)
            asked = ReadRequest(key(shift), NAMESPACE, nbytes, memoryview(space)[shift:])
            (result,) = await tier.read([asked])
            assert result.miss is None
            assert space == bytes(shift) + content(shift, nbytes)

    within(body)


def test_longer_buffers_are_left_alone_beyond_the_block(within: Callable[[Body], None]) -> None:
    async def body(tier: Tier) -> None:
        given = item(1, 5000)._replace(buffer=memoryview(content(1, 20_000)))
        await tier.write([given])
        space = bytearray(b"\xaa" * 20_000)
        (result,) = await tier.read([ReadRequest(key(1), NAMESPACE, 5000, memoryview(space))])
        assert result.miss is None
        assert space == content(1, 20_000)[:5000] + b"\xaa" * 15_000

    within(body)


@pytest.mark.parametrize(
    "changed", [{"namespace": b"another namespac"}, {"raw_bytes": 4096}, {"raw_bytes": 8191}]
)
def test_another_identity_is_told_before_a_byte_is_read(
    changed: dict[str, Any], within: Callable[[Body], None]
) -> None:
    async def body(tier: Tier) -> None:
        await tier.write([item(1)])
        asked = request(1)._replace(**changed)
        assert await tier.read([asked]) == [(None, Miss.IDENTITY)]
        assert not any(asked.buffer)
        result, _ = await get(tier, 1)
        assert result.miss is None  # to its owner it is still there

    within(body)


def test_results_come_in_the_order_of_the_requests(within: Callable[[Body], None]) -> None:
    async def body(tier: Tier) -> None:
        sizes = {n: 1000 * n for n in range(1, 30)}
        results = await tier.write([item(n, nbytes) for n, nbytes in sizes.items()])
        assert [r.refusal for r in results] == [None] * 29
        order = [7, 99, 3, 29, 98, 1, 7]
        asked = [request(n, sizes.get(n, 50)) for n in order]
        results_read = await tier.read(asked)
        misses = [result.miss for result in results_read]
        assert misses == [None, Miss.ABSENT, None, None, Miss.ABSENT, None, None]
        for n, one in zip(order, asked, strict=True):
            if n in sizes:
                assert bytes(one.buffer) == content(n, sizes[n])

    within(body)


def test_the_first_write_of_a_key_wins(within: Callable[[Body], None]) -> None:
    async def body(tier: Tier) -> None:
        twice = [item(1), item(1)._replace(buffer=memoryview(content(9, 8192)))]
        assert [r.refusal for r in await tier.write(twice)] == [None, None]
        assert [r.refusal for r in await tier.write([twice[1], item(2)])] == [None, None]
        assert (await get(tier, 1))[1] == content(1, 8192)
        assert (await get(tier, 2))[1] == content(2, 8192)

    within(body)


def test_a_record_that_cannot_be_is_refused_alone(
    within: Callable[[Body], None],
) -> None:
    async def body(tier: Tier) -> None:
        short = item(1)._replace(buffer=memoryview(bytes(8191)))
        empty = item(2, 0)
        results = await tier.write([short, item(3), empty, item(4, priority=101), item(5)])
        invalid = Refusal.INVALID
        assert [r.refusal for r in results] == [invalid, None, invalid, invalid, None]
        there = await tier.contains([key(n) for n in range(1, 6)])
        assert there == [False, False, True, False, True]

    within(body)


def test_deleted_is_gone_and_can_be_written_again(within: Callable[[Body], None]) -> None:
    async def body(tier: Tier) -> None:
        await tier.write([item(n) for n in range(6)])
        assert await tier.delete([key(1), key(2), key(2), key(77)]) == 2
        assert await tier.contains([key(n) for n in range(4)]) == [True, False, False, True]
        assert (await get(tier, 1))[0].miss in GONE
        await tier.write([item(1, 3000)])
        assert (await get(tier, 1, 3000))[1] == content(1, 3000)

    within(body)


def test_empty_batches(within: Callable[[Body], None]) -> None:
    async def body(tier: Tier) -> None:
        assert await tier.contains([]) == []
        assert await tier.read([]) == []
        assert await tier.write([]) == []
        assert await tier.delete([]) == 0

    within(body)


def test_a_full_tier_evicts_what_was_used_longest_ago(within: Callable[[Body], None]) -> None:
    async def body(tier: Tier) -> None:
        nbytes = CAPACITY_BYTES // 16
        for n in range(10):
            await tier.write([item(n, nbytes)])
        await get(tier, 0, nbytes)
        for n in range(10, 20):
            assert [r.refusal for r in await tier.write([item(n, nbytes)])] == [None]
        held = await tier.contains([key(n) for n in range(20)])
        assert held[0]
        assert not held[1]
        assert held[19]
        assert (await get(tier, 1, nbytes))[0].miss is Miss.EVICTED
        for n in range(20):
            result, data = await get(tier, n, nbytes)
            assert (result.miss is None) == held[n]
            assert not held[n] or data == content(n, nbytes)

    within(body)


def test_a_better_claim_is_not_evicted(within: Callable[[Body], None]) -> None:
    async def body(tier: Tier) -> None:
        nbytes = CAPACITY_BYTES // 8
        for n in range(9):
            await tier.write([item(n, nbytes, priority=80)])
        held = await tier.contains([key(n) for n in range(9)])
        results = await tier.write([item(20, nbytes, priority=79), item(21, nbytes)])
        assert [r.refusal for r in results] == [Refusal.FULL, Refusal.FULL]
        assert await tier.contains([key(n) for n in range(9)]) == held
        (equal,) = await tier.write([item(22, nbytes, priority=80)])
        assert equal.refusal is None

    within(body)


def test_a_batch_larger_than_the_tier_keeps_what_fits(within: Callable[[Body], None]) -> None:
    async def body(tier: Tier) -> None:
        nbytes = CAPACITY_BYTES // 32
        await tier.write([item(n, nbytes) for n in range(100)])
        held = await tier.contains([key(n) for n in range(100)])
        assert 20 < sum(held) < 33
        for n in range(100):
            result, data = await get(tier, n, nbytes)
            assert result.miss is None if held[n] else result.miss in GONE
            assert not held[n] or data == content(n, nbytes)

    within(body)


def test_many_batches_at_once(within: Callable[[Body], None]) -> None:
    async def body(tier: Tier) -> None:
        async def write_and_read(worker: int) -> None:
            mine = [worker * 10 + n for n in range(10)]
            shared = [1000, 1001]
            await tier.write([item(n) for n in mine + shared])
            for n in mine + shared:
                result, data = await get(tier, n)
                assert result.miss is None
                assert data == content(n, 8192)
            assert await tier.delete([key(n) for n in mine[5:]]) == 5

        await asyncio.gather(*(write_and_read(worker) for worker in range(12)))
        held = await tier.contains([key(n) for n in range(120)])
        assert held == [n % 10 < 5 for n in range(120)]

    within(body)


def test_a_flipped_bit_is_a_miss_and_the_block_is_dropped(
    subject: Subject, tmp_path: Path, within: Callable[[Body], None]
) -> None:
    async def body(tier: Tier) -> None:
        await tier.write([item(n, 9000) for n in range(40)])
        nbits = 8 * len(subject.stored(tier, tmp_path, key(0)))
        for n in range(1, 40, 2):
            bits = 8 * len(subject.stored(tier, tmp_path, key(n)))
            subject.flip(tier, tmp_path, key(n), bits - 1 if n == 1 else n * 997 % bits)
        subject.flip(tier, tmp_path, key(0), nbits // 2)
        results = await tier.read([request(n, 9000) for n in range(40)])
        wrong = [n for n, result in enumerate(results) if result.miss is Miss.CHECKSUM]
        assert wrong == [0, *range(1, 40, 2)]
        assert [r.miss for r in results if r.miss is not Miss.CHECKSUM] == [None] * 19
        assert await tier.contains([key(n) for n in range(40)]) == [
            n not in wrong for n in range(40)
        ]
        await tier.write([item(1, 9000)])
        assert (await get(tier, 1, 9000))[1] == content(1, 9000)

    within(body)


def test_the_bytes_are_where_the_helper_looks(
    subject: Subject, tmp_path: Path, within: Callable[[Body], None]
) -> None:
    async def body(tier: Tier) -> None:
        await tier.write([item(n, 9000) for n in range(3)])
        if "zstd" not in subject.name:
            assert subject.stored(tier, tmp_path, key(1)) == content(1, 9000)
        else:
            assert content(1, 9000)[:-1:2] in subject.stored(tier, tmp_path, key(1))

    within(body)


def test_a_closed_tier_says_so(subject: Subject, tmp_path: Path) -> None:
    async def body() -> None:
        tier = subject.open(tmp_path)
        await tier.close()
        await tier.close()
        with pytest.raises(ClosedError):
            await tier.contains([key(1)])
        with pytest.raises(ClosedError):
            await tier.read([request(1)])
        with pytest.raises(ClosedError):
            await tier.write([item(1)])
        with pytest.raises(ClosedError):
            await tier.delete([key(1)])

    run(body())


def test_a_cancelled_read_still_owns_its_buffer_until_it_ends(
    within: Callable[[Body], None],
) -> None:
    async def body(tier: Tier) -> None:
        await tier.write([item(n, 60_000) for n in range(30)])
        asked = [request(n, 60_000) for n in range(30)]
        task = asyncio.ensure_future(tier.read(asked))
        await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait([task])
        before = [bytes(one.buffer) for one in asked]
        await tier.read([request(n, 60_000) for n in range(30)])  # nothing is left under way
        assert [bytes(one.buffer) for one in asked] == before
        assert len(done) == 1

    within(body)

"""The faulty tier fails as told, the same way for the same seed, and never serves a wrong byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import SettingsError, TierError
from kvstore.tier import Miss, Refusal
from kvstore.tiers.faulty import Faults, FaultyLocalTier, FaultyTier
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.ram import RamTier
from tests.tiers.subjects import CAPACITY_BYTES, content, get, item, key, request, run


async def outcomes(faults: Faults, blocks: int = 200) -> list[Any]:
    """What becomes of `blocks` blocks, written and read in batches of ten."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    tier = FaultyTier(RamTier(CAPACITY_BYTES), faults, sleep)
    seen: list[Any] = []
    for first in range(0, blocks, 10):
        numbers = range(first, first + 10)
        try:
            seen += [r.refusal for r in await tier.write([item(n, 1000) for n in numbers])]
            asked = [request(n, 1000) for n in numbers]
            for n, one, result in zip(numbers, asked, await tier.read(asked), strict=True):
                seen.append(result.miss)
                if result.miss is None:
                    assert one.buffer == content(n, 1000)
                elif result.miss is Miss.CHECKSUM:
                    assert one.buffer != content(n, 1000)
                    assert await tier.contains([key(n)]) == [False]
        except TierError:
            seen.append("error")
    await tier.close()
    return [*seen, *slept, sorted(tier.injected.items())]


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({"torn_write_rate": 0.2}, Miss.CHECKSUM),
        ({"bit_flip_rate": 0.2}, Miss.CHECKSUM),
        ({"error_rate": 0.2}, "error"),
        ({"disk_bytes": 50_000}, Refusal.IO_ERROR),
        ({"latency_s": 0.5}, None),
    ],
)
def test_each_fault_happens_and_can_be_had_again(faults: dict[str, Any], expected: Any) -> None:
    first = run(outcomes(Faults(seed=7, **faults)))
    assert first == run(outcomes(Faults(seed=7, **faults)))
    assert expected in first
    if "disk_bytes" not in faults:
        assert first != run(outcomes(Faults(seed=8, **faults)))


def test_rates_are_met() -> None:
    seen = run(outcomes(Faults(bit_flip_rate=0.25), blocks=2000))
    assert 0.2 < seen.count(Miss.CHECKSUM) / 2000 < 0.3


def test_latency_is_waited_for_by_the_clock_that_was_given() -> None:
    seen = run(outcomes(Faults(latency_s=2.0), blocks=1000))
    waits = [value for value in seen if isinstance(value, float)]
    assert len(waits) == 200
    assert 1.5 < sum(waits) / len(waits) < 2.5


def test_without_faults_nothing_is_drawn() -> None:
    assert set(run(outcomes(Faults()))[:-1]) == {None}


@pytest.mark.parametrize(
    "wrong", [{"error_rate": 1.1}, {"bit_flip_rate": -0.1}, {"latency_s": -1}, {"disk_bytes": -1}]
)
def test_faults_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        Faults(**wrong)


def test_a_local_tier_stays_one(tmp_path: Path) -> None:
    async def body() -> None:
        inner = NvmeTier(tmp_path, CAPACITY_BYTES)
        tier = FaultyLocalTier(inner, Faults(bit_flip_rate=1.0))
        await tier.write([item(1, priority=90)])
        tier.touch([key(1)])
        assert tier.peek([key(1), key(2)]) == [True, False]
        assert tier.protected_bytes(item(1).record.namespace) == 8192
        assert await tier.retain([key(1)], 35, 0.0) == 1
        assert tier.protected_bytes(item(1).record.namespace) == 0
        assert (await get(tier, 1))[0].miss is Miss.CHECKSUM
        assert tier.peek([key(1)]) == [False]
        assert tier.was_evicted(key(1))
        assert tier.stats()["injected_bit_flips"] == 1
        await tier.remember([])
        assert tier.namespaces() == {}
        await tier.close()

    run(body())

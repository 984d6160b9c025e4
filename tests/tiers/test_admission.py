"""Which blocks are written at all, and how many bytes a day."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.admission import DAY_S, AdmitReused, WriteBudget, admission_rule
from kvstore.tier import Refusal
from kvstore.tiers.nvme import NvmeTier
from tests.tiers.subjects import item, key, run

NOON_S = 20_000 * DAY_S + DAY_S / 2


def test_all_admits_all() -> None:
    assert admission_rule("all").admits(key(1), 0)


def test_priority_admits_what_someone_asked_to_keep() -> None:
    rule = admission_rule("priority")
    assert [rule.admits(key(1), priority) for priority in (0, 35, 36, 100)] == [
        *(False, False),
        *(True, True),
    ]


def test_reused_admits_the_second_offer_and_what_was_used() -> None:
    rule = admission_rule("reused")
    assert [rule.admits(key(1), 35) for _ in range(3)] == [False, True, True]
    rule.used([key(2)])
    assert rule.admits(key(2), 35)


def test_reused_remembers_so_many_and_no_more() -> None:
    rule = AdmitReused(keys=3)
    rule.used([key(n) for n in range(3)])
    rule.used([key(0)])
    rule.used([key(3)])
    assert [rule.admits(key(n), 35) for n in (0, 3, 1)] == [True, True, False]
    assert len(rule._seen) == 3


def test_budget_is_for_a_day() -> None:
    budget = WriteBudget(100)
    assert budget.take(60, NOON_S)
    assert not budget.take(41, NOON_S)
    assert budget.take(40, NOON_S)
    assert budget.written_bytes == 100
    assert not budget.take(1, NOON_S + DAY_S / 2 - 1)
    assert budget.take(100, NOON_S + DAY_S / 2)


def test_a_clock_set_back_gives_nothing_back() -> None:
    budget = WriteBudget(100)
    budget.take(100, NOON_S)
    assert not budget.take(1, NOON_S - 5 * DAY_S)


def test_without_a_limit_bytes_are_counted() -> None:
    budget = WriteBudget(None)
    assert budget.take(10**15, NOON_S)
    assert budget.written_bytes == 10**15


@pytest.mark.parametrize("rule", ["reused", "priority"])
def test_the_tier_refuses_what_the_rule_refuses(rule: str, tmp_path: Path) -> None:
    async def body() -> None:
        tier = NvmeTier(tmp_path, 4 << 20, admission=rule)  # type: ignore[arg-type]
        tier.touch([key(1)])
        results = await tier.write([item(1), item(2, priority=90), item(3)])
        refused = Refusal.ADMISSION
        assert [r.refusal for r in results] == (
            [None, refused, refused] if rule == "reused" else [refused, None, refused]
        )
        assert tier.stats()["refused_admission"] == 2
        await tier.close()

    run(body())


def test_what_there_is_no_room_for_does_not_cost_the_budget(tmp_path: Path) -> None:
    async def body() -> None:
        nbytes = 1 << 20
        tier = NvmeTier(tmp_path, 4 << 20, daily_write_bytes=8 * nbytes)
        kept = [item(n, nbytes, priority=90) for n in range(3)]
        assert [r.refusal for r in await tier.write(kept)] == [None] * 3
        for n in range(10, 20):
            assert [r.refusal for r in await tier.write([item(n, nbytes)])] == [Refusal.FULL]
        assert tier.stats()["written_today_bytes"] == 3 * nbytes
        await tier.delete([key(0)])
        assert [r.refusal for r in await tier.write([item(30, nbytes)])] == [None]
        await tier.close()

    run(body())


def test_the_budget_of_the_day_outlives_the_process(tmp_path: Path) -> None:
    async def day(now_s: float, first: int, taken: int) -> None:
        tier = NvmeTier(tmp_path, 4 << 20, daily_write_bytes=5 * 8192, now_s=lambda: now_s)
        results = await tier.write([item(n) for n in range(first, first + 4)])
        refusals = [r.refusal for r in results]
        assert refusals == [None] * taken + [Refusal.BUDGET] * (4 - taken)
        await tier.close()

    async def body() -> None:
        await day(NOON_S, 0, 4)
        await day(NOON_S + 60, 10, 1)
        await day(NOON_S + 120, 20, 0)
        await day(NOON_S + DAY_S, 30, 4)

    run(body())

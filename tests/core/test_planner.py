"""The planner against the definition: of all ways, the one with the least total time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.planner import (
    DEADLINE_SLACK,
    MEETING_SAVES,
    MIN_DEADLINE_S,
    LinearCost,
    Plan,
    plan_load,
    prefill_seconds,
)

BLOCK_TOKENS = 16
BLOCK_BYTES = 100_000


def cost(a: float, b: float, points: list[tuple[float, float]]) -> LinearCost:
    fitted = LinearCost()
    for x, y in points:
        fitted.observe(x, y, a * x + b * y)
    return fitted


def load_cost(latency_s: float, s_per_byte: float) -> LinearCost:
    return cost(latency_s, s_per_byte, [(1, 1e5), (1, 1e6), (1, 5e6)])


def prefill_cost(per_token_s: float, per_position_s: float) -> LinearCost:
    shapes = [(100.0, 50.0), (1000.0, 500.0), (100.0, 5000.0)]
    return cost(per_token_s, per_position_s, [(n, n * at) for n, at in shapes])


@given(st.floats(0, 1), st.floats(1e-12, 1e-6))
def test_a_fit_finds_the_coefficients_it_was_fed(a: float, b: float) -> None:
    fitted = load_cost(a, b)
    assert fitted.coefficients() == pytest.approx((a, b), rel=1e-4, abs=1e-7)
    assert fitted.seconds(1, 2e6) == pytest.approx(a + b * 2e6, rel=1e-4, abs=1e-7)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1e8), st.floats(0, 10)), min_size=1))
def test_a_fit_never_promises_less_than_nothing(seen: list[tuple[float, float, float]]) -> None:
    fitted = LinearCost()
    for x, y, seconds in seen:
        fitted.observe(x, y, seconds)
    a, b = fitted.coefficients()
    assert a >= 0
    assert b >= 0


def test_nothing_is_expected_before_the_first_observation() -> None:
    assert LinearCost().seconds(1, 1) is None
    assert prefill_seconds(LinearCost(), 0, 10) is None


def test_the_present_outweighs_the_past() -> None:
    fitted = LinearCost()
    for _ in range(100):
        fitted.observe(1, 1e6, 1.0)
    for _ in range(30):
        fitted.observe(1, 1e6, 0.1)
    seconds = fitted.seconds(1, 1e6)
    assert seconds is not None
    assert 0.1 <= seconds < 0.15


def test_prefill_grows_with_the_context() -> None:
    speed = prefill_cost(1e-3, 1e-6)
    early, late = prefill_seconds(speed, 0, 100), prefill_seconds(speed, 1000, 1100)
    assert early == pytest.approx(100 * 1e-3 + 100 * 50 * 1e-6, rel=1e-3)
    assert late == pytest.approx(100 * 1e-3 + 100 * 1050 * 1e-6, rel=1e-3)


tier_costs = st.tuples(st.floats(0, 0.2), st.floats(1e-10, 1e-6))


@given(
    st.lists(st.sampled_from(["ram", "nvme", "remote"]), max_size=12),
    tier_costs,
    tier_costs,
    st.tuples(st.floats(1e-6, 1e-2), st.floats(0, 1e-5)),
    st.integers(0, 5),
    st.integers(0, 100),
    st.integers(0, 10**7),
)
def test_a_plan_is_the_best_of_all(
    sources: list[str],
    nvme: tuple[float, float],
    remote: tuple[float, float],
    speed: tuple[float, float],
    start_block: int,
    tail_tokens: int,
    queued: int,
) -> None:
    load = {"nvme": load_cost(*nvme), "remote": load_cost(*remote)}
    prefill = prefill_cost(*speed)
    start = start_block * BLOCK_TOKENS
    prompt = start + len(sources) * BLOCK_TOKENS + tail_tokens

    def computing(blocks: int) -> float:
        seconds = prefill_seconds(prefill, start + blocks * BLOCK_TOKENS, prompt)
        assert seconds is not None
        return seconds

    def total(blocks: int) -> float:
        seconds = computing(blocks)
        for tier, tier_cost in load.items():
            count = sources[:blocks].count(tier)
            if count:
                a, b = tier_cost.coefficients()
                waiting = queued if tier == "nvme" else 0
                seconds += a + b * (waiting + count * BLOCK_BYTES)
        return seconds

    plan = plan_load(
        sources, BLOCK_BYTES, BLOCK_TOKENS, start, prompt, load, prefill, {"nvme": queued}
    )
    best = min(total(n) for n in range(len(sources) + 1))
    assert total(plan.blocks) == pytest.approx(best, rel=1e-9, abs=1e-12)
    if plan.blocks:
        saved_s = computing(0) - computing(plan.blocks)
        assert plan.deadline_s == pytest.approx(max(MIN_DEADLINE_S, DEADLINE_SLACK * saved_s))
    else:
        assert plan.deadline_s is None

    def both(border: int) -> float:
        """Loaded up to the first block that costs anything, and from `border` on."""
        at_once, after = sources[:free], sources[border:]
        loaded = sum(
            a + b * ((queued if tier == "nvme" else 0) + after.count(tier) * BLOCK_BYTES)
            for tier, (a, b) in ((tier, load[tier].coefficients()) for tier in set(after) & {*load})
        )
        return max(computing(len(at_once)) - computing(border), loaded) + computing(len(sources))

    free = next((i for i, source in enumerate(sources) if source in load), len(sources))
    least = min(both(border) for border in range(free, len(sources) + 1))
    if plan.meeting is None:
        whole = {free, len(sources)}  # all is loaded, or nothing that costs
        borders = [b for b in range(free, len(sources) + 1) if both(b) <= least * (1 + 1e-9)]
        assert whole & {*borders} or least >= best * (1 - MEETING_SAVES) - 1e-12
    else:
        computed, deadline_s = plan.meeting
        assert computed.start == free < computed.stop < len(sources)
        assert both(computed.stop) == pytest.approx(least, rel=1e-9, abs=1e-12)
        assert least < best * (1 - MEETING_SAVES) + 1e-12
        saved_s = computing(0) - computing(len(sources))
        assert deadline_s == pytest.approx(max(MIN_DEADLINE_S, DEADLINE_SLACK * saved_s))


def test_what_loads_as_fast_as_it_is_computed_meets_half_way() -> None:
    prefill = prefill_cost(1e-3, 0)  # 16 ms a block
    load = {"nvme": load_cost(0, 16e-3 / BLOCK_BYTES)}
    plan = plan_load(["nvme"] * 10, BLOCK_BYTES, BLOCK_TOKENS, 0, 160, load, prefill, {})
    assert plan.meeting is not None
    assert plan.meeting.computed == range(5)
    # What is in RAM comes first, and costs nothing.
    sources = ["ram"] * 2 + ["nvme"] * 8
    plan = plan_load(sources, BLOCK_BYTES, BLOCK_TOKENS, 0, 160, load, prefill, {})
    assert plan.meeting is not None
    assert plan.meeting.computed == range(2, 6)


def test_what_loads_much_faster_is_not_computed_meanwhile() -> None:
    prefill = prefill_cost(1e-3, 0)
    load = {"nvme": load_cost(0, 1e-3 / BLOCK_BYTES)}
    plan = plan_load(["nvme"] * 100, BLOCK_BYTES, BLOCK_TOKENS, 0, 1600, load, prefill, {})
    assert plan.blocks == 100
    assert plan.meeting is None


def test_ram_is_free_and_always_loaded() -> None:
    plan = plan_load(["ram"] * 8, BLOCK_BYTES, BLOCK_TOKENS, 0, 200, {}, prefill_cost(1e-6, 0), {})
    assert plan.blocks == 8


def test_a_slow_tier_is_left_alone_and_a_fast_one_is_not() -> None:
    prefill = prefill_cost(1e-3, 0)  # 16 ms a block
    sources = ["nvme"] * 10
    slow = {"nvme": load_cost(0, 1e-6)}  # 100 ms a block
    fast = {"nvme": load_cost(0.01, 1e-9)}
    args = (BLOCK_BYTES, BLOCK_TOKENS, 0, 160)
    assert plan_load(sources, *args, slow, prefill, {}).blocks == 0
    assert plan_load(sources, *args, fast, prefill, {}).blocks == 10
    # Enough in the queue before it, and the fast one is as bad.
    assert plan_load(sources, *args, fast, prefill, {"nvme": 10**9}).blocks == 0


@pytest.mark.parametrize("unknown", ["tier", "prefill"])
def test_what_was_never_measured_is_tried_once(unknown: str) -> None:
    load = {"nvme": LinearCost() if unknown == "tier" else load_cost(10, 1)}
    prefill = LinearCost() if unknown == "prefill" else prefill_cost(1e-3, 0)
    plan = plan_load(["nvme"] * 3, BLOCK_BYTES, BLOCK_TOKENS, 0, 48, load, prefill, {})
    assert plan.blocks == 3
    assert (plan.deadline_s is None) == (unknown == "prefill")


def test_nothing_to_load() -> None:
    assert plan_load([], BLOCK_BYTES, BLOCK_TOKENS, 0, 48, {}, LinearCost(), {}) == Plan(0, None)

"""Retention: what may be asked, and how far a budget goes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import RequestError
from kvstore.retention import DEFAULT_PRIORITY, MAX_PRIORITY, Retention, within_budget


@pytest.mark.parametrize("priority", [-1, 101, 1000])
def test_a_priority_out_of_range_is_refused(priority: int) -> None:
    with pytest.raises(RequestError, match=str(priority)):
        Retention(priority)


@pytest.mark.parametrize("ttl_s", [0, -1.0, math.inf, math.nan])
def test_a_ttl_that_is_no_time_is_refused(ttl_s: float) -> None:
    with pytest.raises(RequestError, match="ttl_s"):
        Retention(ttl_s=ttl_s)


def test_the_bounds_themselves_are_allowed() -> None:
    assert Retention(0).priority == 0
    assert Retention(MAX_PRIORITY, 0.001).ttl_s == 0.001
    assert Retention() == Retention(DEFAULT_PRIORITY, None)


@given(
    st.integers(DEFAULT_PRIORITY + 1, MAX_PRIORITY),
    st.lists(st.integers(0, 50)),
    st.integers(0, 300),
    st.integers(0, 300),
)
def test_the_leading_blocks_are_raised_that_the_budget_holds(
    priority: int, sizes: list[int], held: int, budget: int
) -> None:
    allowed = within_budget(priority, sizes, held, budget)
    raised = sum(sizes[:allowed])
    assert raised == 0 or held + raised <= budget
    if allowed < len(sizes):
        assert held + raised + sizes[allowed] > budget


@given(st.integers(0, DEFAULT_PRIORITY), st.lists(st.integers(0, 50)))
def test_what_does_not_raise_needs_no_budget(priority: int, sizes: list[int]) -> None:
    assert within_budget(priority, sizes, 1000, 0) == len(sizes)

"""The breaker: three failures open it, time and one success close it."""

from __future__ import annotations

import pytest

from kvstore.breaker import FAILURES_TO_OPEN, RETRY_AFTER_S, Breaker


def opened(now_s: float = 0.0) -> Breaker:
    breaker = Breaker()
    for _ in range(FAILURES_TO_OPEN):
        assert breaker.begin(now_s)
        breaker.failed(now_s)
    return breaker


def test_it_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker()
    for _ in range(5 * FAILURES_TO_OPEN):
        for _ in range(FAILURES_TO_OPEN - 1):
            breaker.failed(0.0)
        assert breaker.allows(0.0)
        breaker.succeeded()
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed(0.0)
    assert not breaker.allows(0.0)
    assert not breaker.begin(0.0)


def test_it_lets_one_call_through_after_a_while() -> None:
    breaker = opened(100.0)
    assert not breaker.begin(100.0 + RETRY_AFTER_S - 0.1)
    retry_s = 100.0 + RETRY_AFTER_S
    assert breaker.allows(retry_s)
    assert breaker.begin(retry_s)
    assert not breaker.allows(retry_s)
    assert not breaker.begin(retry_s)


def test_a_trial_that_succeeds_closes_it() -> None:
    breaker = opened()
    assert breaker.begin(RETRY_AFTER_S)
    breaker.succeeded()
    assert breaker.begin(RETRY_AFTER_S)
    assert breaker.begin(RETRY_AFTER_S)


def test_a_trial_that_fails_begins_the_wait_anew() -> None:
    breaker = opened()
    assert breaker.begin(RETRY_AFTER_S)
    breaker.failed(RETRY_AFTER_S)
    assert not breaker.begin(2 * RETRY_AFTER_S - 0.1)
    assert breaker.begin(2 * RETRY_AFTER_S)


def test_asking_changes_nothing() -> None:
    breaker = opened()
    assert all(breaker.allows(RETRY_AFTER_S) for _ in range(5))
    assert breaker.begin(RETRY_AFTER_S)


@pytest.mark.parametrize("ends_well", [True, False])
def test_a_call_given_up_opens_it_at_once_until_that_call_ends(ends_well: bool) -> None:
    breaker = Breaker()
    assert breaker.begin(0.0)
    breaker.gave_up(5.0)
    assert breaker.unanswered == 1
    assert not breaker.allows(5.0)
    assert not breaker.allows(1000.0)
    breaker.answered()
    if ends_well:
        breaker.succeeded()
        assert breaker.allows(1000.0)
    else:
        breaker.failed(1000.0)
        assert not breaker.allows(1000.0)
        assert breaker.allows(1000.0 + RETRY_AFTER_S)

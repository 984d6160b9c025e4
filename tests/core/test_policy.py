"""Ranks: what each policy makes of admissions and uses."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.policy import EvictionPolicy, Fifo, Lru, Rows


def rows(*numbers: int) -> Rows:
    return np.array(numbers, dtype=np.int64)


def test_lru_ranks_by_last_use() -> None:
    policy = Lru()
    first, second = policy.admitted(rows(0, 1)), policy.admitted(rows(2))
    assert first[0] == first[1] < second[0]
    assert policy.touched(rows(0), first[:1])[0] > second[0]


def test_fifo_ranks_by_admission_whatever_is_used() -> None:
    policy = Fifo()
    first, second = policy.admitted(rows(0)), policy.admitted(rows(1))
    assert first[0] < second[0]
    assert policy.touched(rows(0), first)[0] == first[0]


@pytest.mark.parametrize("policy", [Lru(), Fifo()])
def test_a_use_never_lowers_a_rank(policy: EvictionPolicy) -> None:
    """The table corrects ranks when they surface, which finds only those that are too low."""
    ranks = policy.admitted(rows(*range(5)))
    for _ in range(3):
        after = policy.touched(rows(*range(5)), ranks)
        assert (after >= ranks).all()
        ranks = after


@pytest.mark.parametrize("policy", [Lru(), Fifo()])
def test_one_rank_a_row(policy: EvictionPolicy) -> None:
    for count in (0, 1, 7):
        numbers = rows(*range(count))
        assert policy.admitted(numbers).shape == (count,)
        assert policy.touched(numbers, np.zeros(count, dtype=np.int64)).shape == (count,)

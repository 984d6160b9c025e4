"""Histograms against counting by hand."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from kvstore.histogram import AGE_BOUNDS_S, LATENCY_BOUNDS_S, Distribution, Histogram

BOUNDS = (1.0, 2.0, 5.0)


def by_hand(values: list[float], bounds: tuple[float, ...]) -> tuple[int, ...]:
    edges = [-1.0, *bounds, float("inf")]
    return tuple(sum(low < value <= high for value in values) for low, high in pairwise(edges))


def test_every_value_is_in_one_bucket() -> None:
    rng = random.Random(1)
    random_values = [rng.choice([0.0, 1.0, 1.5, 2.0, 4.0, 5.0, 9.0]) for _ in range(99)]
    one, many = Histogram(BOUNDS), Histogram(BOUNDS)
    for value in random_values:
        one.add(value)
    many.add_all(np.array(random_values))
    assert one.read().counts == by_hand(random_values, BOUNDS)
    assert many.read().counts == one.read().counts
    assert one.read().total == pytest.approx(sum(random_values))
    assert many.read().total == pytest.approx(sum(random_values))
    assert one.read().observed == 99


def test_a_value_many_times() -> None:
    histogram = Histogram(BOUNDS)
    histogram.add(1.5, 7)
    assert histogram.read() == Distribution(BOUNDS, (0, 7, 0, 0), 10.5)


def test_a_clock_that_was_set_back() -> None:
    histogram = Histogram(BOUNDS)
    histogram.add(-3.0)
    histogram.add_all(np.array([-1.0, 1.5]))
    assert histogram.read() == Distribution(BOUNDS, (2, 1, 0, 0), 1.5)


def test_no_values() -> None:
    histogram = Histogram(BOUNDS)
    histogram.add_all(np.zeros(0))
    assert histogram.read().observed == 0
    assert histogram.read().quantile(0.5) is None


def test_quantiles_lie_where_the_values_do() -> None:
    read = Distribution(BOUNDS, (0, 10, 10, 0), 0.0)
    assert read.quantile(0.25) == 1.5
    assert read.quantile(0.5) == 2.0
    assert read.quantile(1.0) == 5.0
    assert Distribution(BOUNDS, (4, 0, 0, 0), 0.0).quantile(0.5) == 0.5
    assert Distribution(BOUNDS, (0, 0, 0, 4), 0.0).quantile(0.5) == 5.0


@pytest.mark.parametrize("bounds", [LATENCY_BOUNDS_S, AGE_BOUNDS_S])
def test_bounds_rise(bounds: tuple[float, ...]) -> None:
    assert list(bounds) == sorted(set(bounds))

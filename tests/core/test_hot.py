"""The hottest prefixes against counting them all."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from kvstore.hot import HotPrefixes, Prefix


def prefix(number: int) -> Prefix:
    return Prefix("local", bytes(16), number.to_bytes(16))


def test_exact_while_there_is_room() -> None:
    hot = HotPrefixes(capacity=4)
    for number, blocks in [(1, 10), (2, 1), (1, 4), (3, 5)]:
        hot.add(prefix(number), blocks)
    first, second, third = hot.top(10)
    assert [each.prefix for each in (first, second, third)] == [prefix(1), prefix(3), prefix(2)]
    assert [each.share for each in (first, second, third)] == [14 / 20, 5 / 20, 1 / 20]
    assert first.longest_blocks == 10
    assert hot.top(1) == [first]


@pytest.mark.parametrize("seed", range(5))
def test_no_heavy_hitter_is_lost(seed: int) -> None:
    """Counts are never too low, and too high by at most a `capacity`-th of all."""
    rng, capacity = random.Random(seed), 16
    hot, truth = HotPrefixes(capacity), Counter[Prefix]()
    for _ in range(3_000):
        which, blocks = prefix(min(int(rng.paretovariate(0.7)), 500)), rng.randint(1, 9)
        hot.add(which, blocks)
        truth[which] += blocks
    total = truth.total()
    found = {each.prefix: each.share * total for each in hot.top(1_000)}
    assert len(found) == capacity
    assert {each for each, blocks in truth.items() if blocks > total / capacity} <= set(found)
    for each, count in found.items():
        assert truth[each] - 1e-6 <= count <= truth[each] + total / capacity + 1e-6


def test_what_was_hot_once_makes_way() -> None:
    hot = HotPrefixes(capacity=2)
    hot.add(prefix(1), 100)
    hot.fade(0.01)
    hot.add(prefix(2), 2)
    assert [each.prefix for each in hot.top(2)] == [prefix(2), prefix(1)]
    assert hot.top(2)[0].share == pytest.approx(2 / 3)
    hot.add(prefix(3), 1)  # over the least, which is the faded one
    assert {each.prefix for each in hot.top(9)} == {prefix(2), prefix(3)}
    assert hot.top(9)[0].longest_blocks == 2


def test_nothing_yet() -> None:
    hot = HotPrefixes()
    hot.fade(0.5)
    assert hot.top(10) == []

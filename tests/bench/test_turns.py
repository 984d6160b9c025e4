"""Who is measured when, and what counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvstore.bench.turns import rates, rounds


def contender(name: str, seconds: Iterator[float], log: list[str]) -> Callable[[], float]:
    def turn() -> float:
        log.append(name)
        return next(seconds)

    return turn


def test_contenders_take_turns_and_the_first_round_is_dropped() -> None:
    log: list[str] = []
    turns = {
        "a": contender("a", iter([99.0, 1.0, 2.0]), log),
        "b": contender("b", iter([99.0, 3.0, 4.0]), log),
    }
    assert rounds(turns, 2) == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    assert log == ["a", "b"] * 3


def test_a_rate_comes_from_the_median() -> None:
    turns = {"a": contender("a", iter([99.0, 1.0, 50.0, 2.0]), [])}
    assert rates(turns, 3, 4_000_000_000) == {"a": 2.0}

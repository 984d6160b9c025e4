"""From turns a second to sessions: the arithmetic, and whose pace is compared with whose."""

from __future__ import annotations

import pytest

from kvstore.bench.rows import Row, Unmeasured
from kvstore.bench.sessions import Pace, _rows, best, percentile_95, served
from kvstore.bench.sizes import FULL, GiB


def test_percentile() -> None:
    assert percentile_95([3.0]) == 3.0
    assert percentile_95([float(i) for i in range(1, 101)]) == 95.0
    assert percentile_95([1.0] * 94 + [9.0] * 6) == 9.0
    assert percentile_95([9.0] * 5 + [1.0] * 95) == 1.0
    with pytest.raises(ValueError, match="no values"):
        percentile_95([])


def test_the_best_pace_is_the_quickest_that_is_even_enough() -> None:
    slow, quick, uneven = Pace(4, 2.0, 0.010), Pace(8, 3.0, 0.020), Pace(16, 9.0, 0.050)
    assert best([slow, quick, uneven], 0.050) is uneven
    assert best([slow, quick, uneven], 0.020) is quick
    assert best([slow, quick, uneven], 0.009) is None


def test_sessions_are_those_that_come_back_while_one_thinks() -> None:
    assert served(2.0, 60.0) == 120.0
    assert served(2.0, 60.0, resident=20) == 140.0


def rows_of(off: list[Pace], on: list[Pace], answer_tokens: int = 32) -> list[Row]:
    rows = list(_rows(FULL, answer_tokens, off, on, GiB))
    assert all(isinstance(row, Row) for row in rows)
    return [row for row in rows if isinstance(row, Row)]


def test_rows_give_the_sessions_without_offload_what_hbm_holds() -> None:
    on = [Pace(4, 10.0, 0.020), Pace(8, 20.0, 0.080), Pace(16, 30.0, 0.081)]
    sessions, turns, gap = rows_of([Pace(8, 1.5, 0.080)], on)
    assert (sessions.value, sessions.ceiling) == (20.0 * 60, 1.5 * 60 + 20)
    assert sessions.at_least == 10
    assert "1.17 TiB below HBM" in sessions.note
    assert (turns.value, turns.ceiling) == (20.0, 1.5)
    assert (gap.value, gap.ceiling) == (80.0, 80.0)


def test_the_pace_without_offload_that_it_does_least_for_is_the_one_that_counts() -> None:
    """Nearly as many turns without, and far more evenly: that is what has to be kept as well."""
    off = [Pace(4, 1.4, 0.020), Pace(8, 1.5, 0.080)]
    on = [Pace(4, 10.0, 0.020), Pace(8, 30.0, 0.080)]
    sessions, turns, gap = rows_of(off, on)
    assert (sessions.value, sessions.ceiling) == (10.0 * 60, 1.4 * 60 + 20)
    assert sessions.ok is False
    assert "5.8 at 4, 16.4 at 8" in sessions.note
    assert (turns.value, turns.ceiling) == (10.0, 1.4)
    assert (gap.value, gap.ceiling) == (20.0, 20.0)


def test_longer_answers_are_stated_beside_those_that_are_judged() -> None:
    paces = [Pace(4, 1.0, 0.010)]
    assert [row.at_least for row in rows_of(paces, paces)] == [10, None, None]
    longer = rows_of(paces, paces, FULL.answer_tokens[1])
    assert [row.ok for row in longer] == [None] * 3
    assert all(row.name.endswith(", 128-token answers") for row in longer)
    assert FULL.answer_tokens[1] >= 4 * FULL.answer_tokens[0]


def test_a_pace_that_is_nowhere_even_enough_is_a_failure() -> None:
    off = [Pace(4, 1.0, 0.010), Pace(8, 1.0, 0.020)]
    (said,) = _rows(FULL, 32, off, [Pace(4, 9.0, 0.020)], GiB)
    assert isinstance(said, Unmeasured)
    assert said.outcome == "failed"
    assert "without at 4, 10 ms: it was 20 ms at 4" in said.reason

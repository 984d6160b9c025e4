"""From turns a second to sessions: the arithmetic, and whose pace is compared with whose."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from itertools import count
from types import SimpleNamespace
from typing import cast

import pytest

from kvstore.bench.rows import Row
from kvstore.bench.sessions import Pace, _rows, _Turns, best, percentile_95, served
from kvstore.bench.sizes import FULL, TINY, GiB
from kvstore.engine.engine import Engine
from kvstore.engine.sampling import SamplingParams


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
    return list(_rows(FULL, answer_tokens, off, on, GiB))


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
    judged, stated = FULL.answers
    longer = rows_of(paces, paces, stated.tokens)
    assert [row.ok for row in longer] == [None] * 3
    assert all(row.name.endswith(", 128-token answers") for row in longer)
    assert stated.tokens >= 4 * judged.tokens


def test_a_pace_that_is_nowhere_even_enough_serves_nobody() -> None:
    """A bound that is missed, where there is one."""
    off = [Pace(4, 1.0, 0.010), Pace(8, 1.0, 0.020)]
    (row,) = rows_of(off, [Pace(4, 9.0, 0.020)])
    assert (row.value, row.ceiling, row.ok) == (0.0, 1.0 * 60 + 20, False)
    assert "without at 4, 10 ms: it was 20 ms at 4" in row.note
    (stated,) = rows_of(off, [Pace(4, 9.0, 0.020)], FULL.answers[1].tokens)
    assert stated.ok is None


class Answering:
    """In place of an engine: answers one request after another, a second each, in two tokens."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.asked: deque[int] = deque()
        self.aborted: list[int] = []
        self._numbers = count()

    def add_request(self, prompt: Sequence[int], params: SamplingParams) -> int:
        self.asked.append(next(self._numbers))
        return self.asked[-1]

    def step(self) -> list[SimpleNamespace]:
        self.now_s += 0.5
        number, is_last = self.asked[0], self.now_s % 1 == 0
        if is_last:
            self.asked.popleft()
        return [SimpleNamespace(request_id=number, usage=True if is_last else None)]

    def abort(self, request: int) -> None:
        self.aborted.append(request)

    busy = False


@pytest.mark.parametrize(("at_once", "counted"), [(1, 7), (3, 7), (4, 8)])
def test_a_pace_is_counted_from_the_end_of_a_turn_to_the_end_of_another(
    monkeypatch: pytest.MonkeyPatch, at_once: int, counted: int
) -> None:
    """6.2 s at least, 5 turns at least, and twice as many as are answered at once."""
    engine = Answering()
    monkeypatch.setattr(time, "perf_counter", lambda: engine.now_s)
    sizes = dataclasses.replace(TINY, session_run_s=6.2, session_turns=5)
    pace = _Turns(cast(Engine, engine), [[1] * 128], sizes).pace(at_once, 8)
    assert engine.now_s == at_once + counted
    assert pace == Pace(at_once, 1.0, 0.5)
    assert len(engine.aborted) == at_once - 1


def test_a_pace_has_enough_turns_where_they_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Answering()
    monkeypatch.setattr(time, "perf_counter", lambda: engine.now_s)
    sizes = dataclasses.replace(TINY, session_run_s=1.0, session_turns=24)
    assert _Turns(cast(Engine, engine), [[1] * 128], sizes).pace(1, 8).turns_per_s == 1.0
    assert engine.now_s == 1 + 24

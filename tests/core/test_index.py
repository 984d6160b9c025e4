"""Rows and their states: every move that the table allows, and none that it does not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvstore.errors import IllegalMoveError, InvariantError
from kvstore.index import LEGAL_MOVES, Index, State
from kvstore.policy import Rows

# How a row gets into each state.
PATHS = {
    State.FREE: (),
    State.RESERVED: (State.RESERVED,),
    State.RESIDENT: (State.RESERVED, State.RESIDENT),
    State.EVICTING: (State.RESERVED, State.RESIDENT, State.EVICTING),
}


def rows_in(index: Index, state: State, count: int = 3) -> Rows:
    rows = np.arange(count, dtype=np.int64)
    for step in PATHS[state]:
        index.move(rows, step)
    return rows


def test_every_state_has_its_moves() -> None:
    assert set(LEGAL_MOVES) == set(State)


@pytest.mark.parametrize(("start", "end"), [*itertools.product(State, State)])
def test_a_move_is_made_exactly_when_the_table_has_it(start: State, end: State) -> None:
    index = Index()
    rows = rows_in(index, start)
    if end in LEGAL_MOVES[start]:
        index.move(rows, end)
        assert (index.state[rows] == end).all()
        return
    before = index.state.copy()
    with pytest.raises(IllegalMoveError):
        index.move(rows, end)
    assert (index.state == before).all()


def test_one_bad_row_stops_the_batch() -> None:
    index = Index()
    reserved = rows_in(index, State.RESERVED)
    with pytest.raises(IllegalMoveError, match="row 7 cannot go from FREE to RESIDENT"):
        index.move(np.append(reserved, 7), State.RESIDENT)
    assert (index.state[reserved] == State.RESERVED).all()


def test_a_row_cannot_make_one_move_twice() -> None:
    index = Index()
    rows = index.take(2)
    with pytest.raises(IllegalMoveError, match="twice"):
        index.give_back(np.array([rows[0], rows[1], rows[0]]))
    assert (index.state[rows] == State.RESERVED).all()
    index.check_invariants()


def test_a_pinned_row_is_not_evicted() -> None:
    index = Index()
    rows = rows_in(index, State.RESIDENT)
    index.pins[rows[1]] = 1
    with pytest.raises(IllegalMoveError, match="pinned"):
        index.move(rows, State.EVICTING)
    assert (index.state[rows] == State.RESIDENT).all()


def test_the_table_grows_and_keeps_what_it_has() -> None:
    index = Index(rows=4)
    first = index.take(3)
    index.offset[first] = [10, 20, 30]
    index.keys[int(first[0])] = b"key"
    more = index.take(50)
    assert len(set(first.tolist()) | set(more.tolist())) == 53
    assert index.offset[first].tolist() == [10, 20, 30]
    assert index.keys[int(first[0])] == b"key"
    assert (index.state[more] == State.RESERVED).all()
    index.keys[int(first[0])] = None
    index.check_invariants()
    index.give_back(np.concatenate([first, more]))
    index.check_invariants()


def test_find_answers_for_resident_keys_only() -> None:
    index = Index()
    rows = rows_in(index, State.RESIDENT)
    for row, key in zip(rows.tolist(), (b"a", b"b", b"c"), strict=True):
        index.rows_by_key[key], index.keys[row] = row, key
    assert index.find([b"c", b"x", b"a", b"c"]) == [2, None, 0, 2]
    assert len(index) == 3


@pytest.mark.parametrize("damage", ["state", "pins", "free", "key", "pinned reserved"])
def test_check_invariants_sees(damage: str) -> None:
    index = Index(rows=8)
    row = int(index.take(1)[0])
    index.move(np.array([row]), State.RESIDENT)
    index.rows_by_key[b"k"], index.keys[row] = row, b"k"
    reserved = int(index.take(1)[0])
    if damage == "state":
        index.state[row] = State.FREE
    elif damage == "pins":
        index.pins[row] = -1
    elif damage == "free":
        index._free.pop()
    elif damage == "key":
        index.keys[reserved] = b"k"
    else:
        index.pins[reserved] = 1
    with pytest.raises(InvariantError):
        index.check_invariants()

"""The table of blocks in one tier: a row a block, a column an attribute.

Columns rather than objects, because every verb comes in batches: a batch of
1,000 blocks is a handful of vector operations, and a million blocks fit in
memory and are there again within seconds of a restart.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import IllegalMoveError, InvariantError
from kvstore.hashing import Key
from kvstore.policy import Rows


class State(enum.IntEnum):
    """Where a row is in the life of a block."""

    FREE = 0  # no block; the row may be taken
    RESERVED = 1  # has an extent that someone is filling; no key yet, so nobody finds it
    RESIDENT = 2  # filled, keyed, found, served
    EVICTING = 3  # no longer found; its extent is not yet free


# The whole life of a block. What is not here is a bug, raises, and changes nothing.
LEGAL_MOVES: dict[State, tuple[State, ...]] = {
    State.FREE: (State.RESERVED,),
    State.RESERVED: (State.RESIDENT, State.FREE),  # commit; abort, or lost a race of commits
    State.RESIDENT: (State.EVICTING,),
    State.EVICTING: (State.FREE,),
}

_LEGAL = np.zeros((len(State), len(State)), dtype=bool)
for _start, _ends in LEGAL_MOVES.items():
    for _end in _ends:
        _LEGAL[_start, _end] = True


class Index:
    """Rows, their states, and which key is in which row.

    Not thread-safe. Columns are public numpy arrays, indexed by row; they are
    replaced by longer ones when the table grows, so do not keep them.
    """

    def __init__(self, rows: int = 1024) -> None:
        self.rows_by_key: dict[Key, int] = {}
        self.keys: list[Key | None] = [None] * rows
        self.parents: list[Key] = [b""] * rows
        self.state: NDArray[np.uint8] = np.zeros(rows, dtype=np.uint8)
        self.pins: NDArray[np.int32] = np.zeros(rows, dtype=np.int32)
        self.offset: NDArray[np.int64] = np.zeros(rows, dtype=np.int64)
        self.nbytes: NDArray[np.int64] = np.zeros(rows, dtype=np.int64)
        self.namespace: NDArray[np.int32] = np.zeros(rows, dtype=np.int32)
        self.priority: NDArray[np.uint8] = np.zeros(rows, dtype=np.uint8)
        self.ttl_s: NDArray[np.float64] = np.zeros(rows)
        self.expires_s: NDArray[np.float64] = np.zeros(rows)
        self.rank: NDArray[np.int64] = np.zeros(rows, dtype=np.int64)
        self.used_s: NDArray[np.float64] = np.zeros(rows)  # last use, by the owner's clock
        self._mark: NDArray[np.int64] = np.zeros(rows, dtype=np.int64)
        self._free = list(range(rows - 1, -1, -1))

    def __len__(self) -> int:
        """Rows that are resident."""
        return len(self.rows_by_key)

    def take(self, count: int) -> Rows:
        """`count` rows, FREE -> RESERVED."""
        while len(self._free) < count:
            self._grow()
        split = len(self._free) - count
        rows = np.array(self._free[split:][::-1], dtype=np.int64)
        self.move(rows, State.RESERVED)
        del self._free[split:]
        return rows

    def give_back(self, rows: Rows) -> None:
        """RESERVED or EVICTING -> FREE."""
        self.move(rows, State.FREE)
        self._free.extend(rows[::-1].tolist())

    def move(self, rows: Rows, to: State) -> None:
        """Move all rows, or raise IllegalMoveError and move none."""
        self.check_move(rows, to)
        self.state[rows] = to

    def check_move(self, rows: Rows, to: State) -> None:
        """Raise IllegalMoveError unless every row may go to `to`, and none stands there twice."""
        legal = _LEGAL[self.state[rows], to]
        if not legal.all():
            row = int(rows[int(np.argmin(legal))])
            raise IllegalMoveError(
                f"row {row} cannot go from {State(self.state[row]).name} to {to.name}"
            )
        if to is State.EVICTING and (self.pins[rows] != 0).any():
            raise IllegalMoveError("a pinned row cannot be evicted")
        if not self.are_distinct(rows):
            raise IllegalMoveError(f"a row was to become {to.name} twice")

    def check_resident(self, rows: Rows) -> None:
        """Raise IllegalMoveError unless every row is resident."""
        if (self.state[rows] != State.RESIDENT).any():
            raise IllegalMoveError("a row is not resident")

    def are_distinct(self, rows: Rows) -> bool:
        """Whether no row stands in `rows` twice."""
        order = np.arange(len(rows))
        self._mark[rows] = order
        return bool((self._mark[rows] == order).all())

    def find(self, keys: Sequence[Key]) -> list[int | None]:
        """Row of each resident key. No side effect."""
        return list(map(self.rows_by_key.get, keys))

    def _grow(self) -> None:
        old = len(self.keys)
        self.keys.extend([None] * old)
        self.parents.extend([b""] * old)
        for name, column in self._columns().items():
            setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        self._free[:0] = range(2 * old - 1, old - 1, -1)

    def _columns(self) -> dict[str, NDArray[Any]]:
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}

    def check_invariants(self) -> None:
        """Raises InvariantError unless keys, states and free rows agree."""
        resident = np.flatnonzero(self.state == State.RESIDENT)
        if len(resident) != len(self.rows_by_key):
            raise InvariantError(f"{len(resident)} resident rows, {len(self.rows_by_key)} keys")
        for key, row in self.rows_by_key.items():
            if self.keys[row] != key or self.state[row] != State.RESIDENT:
                raise InvariantError(f"key {key.hex()} points to row {row}, which is not its own")
        if sum(key is not None for key in self.keys) != len(resident):
            raise InvariantError("a row that is not resident has a key")
        free = np.flatnonzero(self.state == State.FREE)
        if sorted(self._free) != free.tolist():
            raise InvariantError("the list of free rows and the states disagree")
        if (self.pins[self.state != State.RESIDENT] != 0).any() or (self.pins < 0).any():
            raise InvariantError("a row that is not resident is pinned, or a pin count is negative")

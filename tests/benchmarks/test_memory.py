"""A peer's blocks: what is left of an earlier round is not taken for this one's."""

from __future__ import annotations

import pytest

from benchmarks.workers.memory import Memory


def moved(memory: Memory) -> None:
    for got, i in zip(memory.target, memory.order, strict=True):
        got[:] = memory.source[i]


def test_what_was_put_in_this_round_passes_and_what_was_put_before_does_not() -> None:
    memory = Memory(4096, 3)
    memory.next_round()
    moved(memory)
    memory.check()
    memory.next_round()
    with pytest.raises(RuntimeError, match="not what went in"):
        memory.check()


def test_a_get_that_brings_nothing_is_seen() -> None:
    memory = Memory(4096, 3)
    moved(memory)
    memory.forget()
    with pytest.raises(RuntimeError, match="not what went in"):
        memory.check()

"""The log of events and what is made of it, without a store."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import FallenBehindError
from kvstore.events import (
    Cleared,
    Contents,
    Event,
    EventLog,
    Removed,
    Stored,
    apply,
    blocks_of,
    pieces,
    runs,
)
from kvstore.hashing import Key

ROOT = b"namespace-------"


def key(number: int) -> Key:
    return b"key-%012d" % number


def stored(*numbers: int, tier: str = "ram", namespace: bytes = ROOT) -> Stored:
    return Stored(tier, namespace, [key(n) for n in numbers], [key(n - 1) for n in numbers])


def removed(*numbers: int, tier: str = "ram", namespace: bytes = ROOT) -> Removed:
    return Removed(tier, namespace, [key(n) for n in numbers])


def after(*events: Event) -> Contents:
    contents: Contents = {}
    for event in events:
        apply(contents, event)
    return contents


def test_tiers_and_namespaces_are_apart() -> None:
    contents = after(stored(1, 2), stored(1, tier="nvme"), stored(3, namespace=b"other"))
    apply(contents, removed(1))
    assert contents == {
        ("ram", ROOT): {key(2): key(1)},
        ("nvme", ROOT): {key(1): key(0)},
        ("ram", b"other"): {key(3): key(2)},
    }


def test_what_is_empty_leaves_no_trace() -> None:
    assert after(stored(1, 2), removed(2), removed(1)) == {}
    assert after(stored(1), stored(2, tier="nvme"), Cleared()) == {}


def test_an_event_may_be_applied_again() -> None:
    assert after(stored(1), stored(1)) == after(stored(1))
    assert after(stored(1, 2), removed(1), removed(1)) == after(stored(1, 2), removed(1))
    assert after(removed(1)) == {}


def test_numbers_begin_with_one_and_have_no_gaps() -> None:
    log = EventLog(100)
    for number in range(1, 6):
        log.append(stored(number))
    assert log.since(0, 100) == [(number, stored(number)) for number in range(1, 6)]
    assert log.since(3, 100) == [(4, stored(4)), (5, stored(5))]
    assert log.since(5, 100) == []


def test_what_is_read_at_once_is_bounded_by_blocks() -> None:
    log = EventLog(100)
    for start in (1, 11, 21):
        log.append(stored(*range(start, start + 10)))
    assert [number for number, _ in log.since(0, 1)] == [1]
    assert [number for number, _ in log.since(0, 10)] == [1]
    assert [number for number, _ in log.since(0, 11)] == [1, 2]


def test_who_has_fallen_behind_is_told() -> None:
    log = EventLog(10)
    for number in range(1, 13):
        log.append(stored(number))
    assert (log.first_id, log.last_id) == (3, 12)
    assert len(log.since(2, 100)) == 10
    with pytest.raises(FallenBehindError, match="events 3 to 12 are kept, not what follows 1"):
        log.since(1, 100)


@pytest.mark.parametrize("after_id", [-1, 2, 99])
def test_a_number_that_was_never_given_is_not_gone_on_from(after_id: int) -> None:
    log = EventLog(10)
    log.append(stored(1))
    with pytest.raises(FallenBehindError):
        log.since(after_id, 1)


def test_an_event_larger_than_the_log_is_lost_to_all() -> None:
    log = EventLog(10)
    log.append(stored(1))
    log.append(stored(*range(2, 22)))
    assert log.since(2, 100) == []
    with pytest.raises(FallenBehindError):
        log.since(1, 100)


@given(st.lists(st.integers(min_value=0, max_value=12), max_size=60))
def test_the_log_is_the_end_of_what_was_told(sizes: list[int]) -> None:
    log, told = EventLog(16), list[Event]()
    for size in sizes:
        event: Event = stored(*range(1, size + 1)) if size else Cleared()
        told.append(event)
        log.append(event)
    kept = log.since(log.first_id - 1, 1000)
    assert kept == list(enumerate(told, 1))[log.first_id - 1 :]
    weights = [blocks_of(event) for event in told]
    assert sum(weights[log.first_id - 1 :]) <= 16
    assert log.first_id == 1 or sum(weights[log.first_id - 2 :]) > 16


def test_pieces_lead_to_the_contents_they_were_made_of() -> None:
    contents = after(stored(*range(25)), stored(*range(5), tier="nvme"))
    parts = list(pieces(contents, 10))
    assert [len(part.keys) for part in parts] == [10, 10, 5, 5]
    assert after(*parts) == contents


def test_pieces_begin_with_the_first_blocks() -> None:
    contents = after(stored(*range(30, 0, -1)))
    keys = [held for part in pieces(contents, 7) for held in part.keys]
    assert keys == [key(n) for n in range(1, 31)]


@given(st.lists(st.integers(min_value=0, max_value=30), max_size=30))
def test_runs_are_chains_after_what_they_continue(parents: list[int]) -> None:
    # Block n names some block before it, or one that is not held.
    held = {key(n): key(min(parent, n - 1)) for n, parent in enumerate(parents, 1)}
    held.pop(key(3), None)
    listed = list(runs(held))
    seen: list[Key] = []
    for parent, run in listed:
        assert held[run[0]] == parent
        assert all(held[later] == earlier for earlier, later in pairwise(run))
        assert parent in seen or parent not in held
        seen += run
    assert sorted(seen) == sorted(held)


def test_one_prompt_is_one_run() -> None:
    held = {key(n): key(n - 1) for n in range(1, 100)}
    assert list(runs(held)) == [(key(0), [key(n) for n in range(1, 100)])]

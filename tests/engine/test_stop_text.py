"""Stop strings in any cut of the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.engine.stop_text import StopText


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (["END"], "abcENDdef", "abc"),
        (["END", "bc"], "abcENDdef", "a"),
        (["aab"], "aaab", "a"),
        (["END"], "abcEN", "abcEN"),
        (["\n\n"], "a\n\nb", "a"),
        ([], "abc", "abc"),
    ],
)
def test_text_ends_before_the_first_stop_string(stop: list[str], text: str, expected: str) -> None:
    for size in (1, 2, 3, len(text)):
        stream = StopText(stop)
        out = ""
        for i in range(0, len(text), size):
            out += stream.push(text[i : i + size])
            if stream.stopped:
                break
        assert out + stream.finish() == expected
        assert stream.stopped == (expected != text)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = StopText(["END"])
    assert stream.push("abcE") == "abc"
    assert stream.push("x") == "Ex"
    assert stream.push("EN") == ""
    assert stream.finish() == "EN"


@given(
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    pieces=st.lists(st.text("ab", max_size=5), max_size=8),
)
def test_any_cut_gives_the_text_before_the_stop_string_that_is_complete_first(
    stop: list[str], pieces: list[str]
) -> None:
    stream, out, seen = StopText(stop), "", ""
    for piece in pieces:
        out += stream.push(piece)
        seen += piece
        complete = [seen.find(s) for s in stop if s in seen]
        if complete:
            assert stream.stopped
            assert out == seen[: min(complete)]
            return
        assert not stream.stopped
    assert out + stream.finish() == seen

"""How many sessions one card serves: each thinks for a while, comes back, and asks again.

With think times it would take hours. So there are none: more sessions than HBM has room for take
turns, the same order again and again, so many of them at once that the engine is never idle, and
what is measured is how many turns it answers in a second and how evenly it makes their tokens.
Then, by Little's law, as many sessions are served as come back in the time that one thinks.

Without a store what a session had is computed again at each turn, except for the sessions that
HBM has room for, which are counted as if they cost nothing. With one, their blocks must lie
somewhere below HBM: so many sessions need so much RAM or NVMe, which is said beside the figure.

Several numbers at once are tried without a store, and each has its own pace and its own p95. The
best that a store does at this p95 is set against each, and the least of these factors counts.
It depends on how long answers are, which take as long with a store as without: two lengths.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from typing import NamedTuple

from kvstore import compose
from kvstore.bench.asking import answer_of, fresh_tokens
from kvstore.bench.benchmark import Bench
from kvstore.bench.rows import Row, Unmeasured
from kvstore.bench.sizes import Sizes, most_at_once, token_bytes
from kvstore.engine.engine import Engine
from kvstore.quantities import format_size

AT_LEAST = 10.0
_FILL_AT_ONCE = 4


class Pace(NamedTuple):
    """What was measured with `at_once` sessions being answered at the same time."""

    at_once: int
    turns_per_s: float
    p95_s: float  # between two tokens of an answer


def percentile_95(values: Sequence[float]) -> float:
    """The least value that 95 % of `values` do not exceed. Raises ValueError without any."""
    if not values:
        raise ValueError("no values")
    return sorted(values)[-(-95 * len(values) // 100) - 1]


def best(paces: Sequence[Pace], p95_s: float) -> Pace | None:
    """The one with the most turns, of those with at most `p95_s` between tokens."""
    alike = [pace for pace in paces if pace.p95_s <= p95_s]
    return max(alike, key=lambda pace: pace.turns_per_s, default=None)


def served(turns_per_s: float, think_s: float, resident: int = 0) -> float:
    """Sessions that come back after `think_s`; those that are resident take none of the turns."""
    return turns_per_s * think_s + resident


def measure(bench: Bench) -> Iterator[Row | Unmeasured]:
    sizes = bench.sizes
    session_bytes = sizes.session_tokens * token_bytes(sizes.model, bench.dtype.itemsize)
    ram_bytes = sizes.sessions * session_bytes * 9 // 8
    bench.need_engine(hbm_bytes=2 * sizes.session_hbm_bytes, ram_bytes=ram_bytes * 5 // 4)
    make = partial(
        Engine,
        bench.model,
        hbm_bytes=sizes.session_hbm_bytes,
        block_tokens=sizes.block_tokens,
        max_batch=most_at_once(sizes),
        prefill_chunk_tokens=sizes.chunk_tokens,
    )
    contexts = [
        fresh_tokens(
            sizes.model.vocab_size,
            sizes.session_tokens - sizes.question_tokens - min(sizes.answers).tokens,
        )
        for _ in range(sizes.sessions)
    ]
    with ExitStack() as stack:
        store = stack.enter_context(compose.open(ram_bytes=ram_bytes))
        yield from bench.pin(store, "sessions")
        on, off = (stack.enter_context(make(store=each)) for each in (store, None))
        for first in range(0, len(contexts), _FILL_AT_ONCE):
            on.generate(contexts[first : first + _FILL_AT_ONCE], answer_of(1))
        turns_off, turns_on = _Turns(off, contexts, sizes), _Turns(on, contexts, sizes)
        for answers in sizes.answers:
            paces_off, paces_on = [], []
            for at_once in answers.at_once:
                paces_off.append(turns_off.pace(at_once, answers.tokens))
                paces_on.append(turns_on.pace(at_once, answers.tokens))
            if not on.stats().counters.get("loaded_blocks", 0):
                raise RuntimeError("no block was loaded")
            yield from _rows(sizes, answers.tokens, paces_off, paces_on, session_bytes)


class _Turns:
    """One engine, and the sessions that take turns with it."""

    def __init__(self, engine: Engine, contexts: Sequence[list[int]], sizes: Sizes) -> None:
        self._engine = engine
        self._sizes = sizes
        self._next = cycle(contexts)
        self._latest: dict[int, float | None] = {}  # requests, and when their last token came

    def pace(self, at_once: int, answer_tokens: int) -> Pace:
        """Answer so many sessions at once, each at such length, for as long as the sizes say.

        Counting begins when as many turns are over as were begun at the same moment, and ends
        with a turn: where a turn takes half a second, the part of one would be an error. Each
        place is counted twice at least.
        """
        gaps: list[float] = []
        over = 0
        while over < at_once:
            over += self._step(at_once, answer_tokens, gaps)
        gaps.clear()
        counted, ended, began_s = 0, 0, time.perf_counter()
        wanted, taken_s = max(self._sizes.session_turns, 2 * at_once), 0.0
        while not ended or counted < wanted or taken_s < self._sizes.session_run_s:
            ended = self._step(at_once, answer_tokens, gaps)
            counted += ended
            taken_s = time.perf_counter() - began_s
        for request in self._latest:
            self._engine.abort(request)
        self._latest.clear()
        while self._engine.busy:
            self._engine.step()
        return Pace(at_once, counted / taken_s, percentile_95(gaps))

    def _ask(self, answer_tokens: int) -> None:
        sizes = self._sizes
        question = fresh_tokens(sizes.model.vocab_size, sizes.question_tokens)
        context = next(self._next)[: sizes.session_tokens - sizes.question_tokens - answer_tokens]
        request = self._engine.add_request(context + question, answer_of(answer_tokens))
        self._latest[request] = None

    def _step(self, at_once: int, answer_tokens: int, gaps: list[float]) -> int:
        """How many turns are over after it; times between tokens go to `gaps`."""
        while len(self._latest) < at_once:
            self._ask(answer_tokens)
        deltas, over = self._engine.step(), 0
        now_s = time.perf_counter()
        for delta in deltas:
            before_s = self._latest[delta.request_id]
            if before_s is not None:
                gaps.append(now_s - before_s)
            self._latest[delta.request_id] = now_s
            if delta.usage is not None:
                del self._latest[delta.request_id]
                over += 1
        return over


def _rows(
    sizes: Sizes,
    answer_tokens: int,
    paces_off: Sequence[Pace],
    paces_on: Sequence[Pace],
    session_bytes: int,
) -> Iterator[Row]:
    """Of the pace without offload that offload does least for; only the first length is judged."""
    resident = sizes.session_hbm_bytes // session_bytes
    context, answers = f"{sizes.session_tokens:,}-token sessions", f"{answer_tokens}-token answers"
    sessions = partial(
        Row,
        name=f"{context} served with offload, {answers}",
        group="sessions",
        unit="sessions",
        against=f"without, at the same p95 between tokens; {format_size(sizes.session_hbm_bytes)} "
        f"of KV, {sizes.think_s:.0f} s of thinking",
        at_least=AT_LEAST if answer_tokens == sizes.answers[0].tokens else None,
    )
    compared: list[tuple[float, Pace, Pace]] = []
    for off in paces_off:
        on = best(paces_on, off.p95_s)
        without = served(off.turns_per_s, sizes.think_s, resident)
        if on is None:
            yield sessions(value=0.0, ceiling=without, note=_too_uneven(off, paces_on))
            return
        compared.append((served(on.turns_per_s, sizes.think_s) / without, off, on))
    _, off, on = min(compared)
    value = served(on.turns_per_s, sizes.think_s)
    below = format_size(int(value) * session_bytes)
    each = ", ".join(f"{factor:.1f} at {pace.at_once}" for factor, pace, _ in compared)
    yield sessions(
        value=value,
        ceiling=served(off.turns_per_s, sizes.think_s, resident),
        note=f"turns a second times {sizes.think_s:.0f} s, and without offload {resident} more, "
        f"which HBM holds; times without, by how many are answered at once there: {each}, of which "
        f"the least counts; at least {sizes.session_run_s:g} s and {sizes.session_turns} turns "
        f"each, {sizes.sessions} sessions in turn; so many sessions need {below} below HBM",
    )
    yield Row(
        name=f"turns of {context} with offload, {answers}",
        group="sessions",
        value=on.turns_per_s,
        unit="turns/s",
        ceiling=off.turns_per_s,
        against=f"without; {on.at_once} and {off.at_once} at once, {sizes.question_tokens} tokens "
        "asked",
    )
    yield Row(
        name=f"p95 between tokens with offload, at that pace, {answers}",
        group="sessions",
        value=on.p95_s * 1e3,
        unit="ms",
        ceiling=off.p95_s * 1e3,
        against="without, at the pace that it is set against",
    )


def _too_uneven(off: Pace, paces_on: Sequence[Pace]) -> str:
    each = ", ".join(f"{pace.p95_s * 1e3:.0f} ms at {pace.at_once}" for pace in paces_on)
    return (
        f"none: with offload no pace keeps the p95 between tokens that there is without at "
        f"{off.at_once}, {off.p95_s * 1e3:.0f} ms: it was {each}"
    )

"""The scheduler over a model made of arithmetic: its KV is the tokens themselves.

The fake memory holds, in each slot of each block, the whole prefix that a real
KV depends on. So a wrong block table, a missed copy, or a block taken too early
shows as a context that is not the sequence's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.engine.scheduler import Scheduler, Step
from kvstore.engine.sequence import Phase, TokenSequence
from kvstore.hashing import TokenChain
from kvstore.identity import Namespace
from kvstore.tiers.block_pool import BlockPool

NAMESPACE = Namespace(
    model="arithmetic",
    weights="",
    tokenizer="",
    kv_dtype="float32",
    layers=1,
    kv_heads=1,
    head_dim=1,
    block_tokens=4,
    rope="",
)
BLOCK_TOKENS = NAMESPACE.block_tokens


def next_token(tokens: Sequence[int], index: int) -> int:
    return (sum((i + 1) * token for i, token in enumerate(tokens)) + 7 * index) % 3


def continued(prompt: Sequence[int], limit: int, index: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < limit:
        tokens.append(next_token(tokens, index))
    return tokens


class FakeEngine:
    """Carries out steps on a memory of prefixes, and samples by arithmetic."""

    def __init__(self, blocks: int, max_batch: int = 4, chunk_tokens: int = 8) -> None:
        self.pool = BlockPool(blocks)
        self.demoted: list[TokenSequence] = []
        self.scheduler = Scheduler(
            self.pool, max_batch=max_batch, chunk_tokens=chunk_tokens, demote=self.demoted.append
        )
        self.memory: list[list[tuple[int, ...]]] = [[()] * BLOCK_TOKENS for _ in range(blocks)]
        self.limits: dict[tuple[int, int], int] = {}
        self.finished: dict[tuple[int, int], list[int]] = {}
        self.arrivals = 0
        self.copies: list[tuple[list[int], list[tuple[tuple[int, ...], ...]]]] = []  # and content

    def add(self, prompt: Sequence[int], generate: int, width: int = 1) -> TokenSequence:
        self.arrivals += 1
        sequence = TokenSequence(NAMESPACE, prompt, arrival=self.arrivals, width=width)
        for index in range(width):
            self.limits[self.arrivals, index] = len(prompt) + generate
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Step:
        while self.scheduler.admit() is not None:
            pass
        step = self.scheduler.plan()
        for source, target in step.copies:
            self.memory[target] = self.memory[source].copy()
        for sequence, tokens in step.pieces:
            for position in range(sequence.computed_tokens, sequence.computed_tokens + tokens):
                block = sequence.block_table[position // BLOCK_TOKENS]
                prefix = tuple(sequence.tokens[: position + 1])
                self.memory[block][position % BLOCK_TOKENS] = prefix
        for piece in step.pieces:
            self._check_context(piece.sequence, piece.sequence.computed_tokens + piece.tokens)
            self.scheduler.advance(piece)
            if piece.sequence.pending_tokens == 0:
                for sequence in [piece.sequence, *self.scheduler.fork(piece.sequence)]:
                    self._sample(sequence)
        return step

    def run(self) -> None:
        while self.scheduler.waiting or self.scheduler.running:
            if not self.step().pieces and self.copies:
                self.end_copy(0)  # there is nothing else to do
            self.scheduler.check_invariants()
        while self.copies:
            self.end_copy(0)

    def begin_copy(self, sequence: TokenSequence) -> None:
        """Copy the full blocks of a running sequence somewhere, slowly."""
        blocks = sequence.block_table[: sequence.computed_blocks]
        self.pool.hold(blocks)
        self.copies.append((blocks, [tuple(self.memory[block]) for block in blocks]))

    def end_copy(self, number: int) -> None:
        blocks, content = self.copies.pop(number)
        assert [tuple(self.memory[block]) for block in blocks] == content
        self.pool.unhold(blocks)

    def _check_context(self, sequence: TokenSequence, tokens: int) -> None:
        for position in range(tokens):
            block = sequence.block_table[position // BLOCK_TOKENS]
            held = self.memory[block][position % BLOCK_TOKENS]
            assert held == tuple(sequence.tokens[: position + 1])

    def _sample(self, sequence: TokenSequence) -> None:
        sequence.append(next_token(sequence.tokens, sequence.index))
        if len(sequence.tokens) >= self.limits[sequence.order]:
            self.scheduler.remove(sequence)
            self.finished[sequence.order] = sequence.tokens


def test_one_sequence_runs_to_its_end() -> None:
    engine = FakeEngine(blocks=8)
    engine.add([1, 2, 0, 1, 1], generate=9)
    engine.run()
    assert engine.finished[1, 0] == continued([1, 2, 0, 1, 1], 14, 0)
    assert engine.pool.used_blocks == 0


def test_chunks_end_on_the_grid_of_positions_wherever_they_begin() -> None:
    engine = FakeEngine(blocks=16, chunk_tokens=8)
    prompt = [i % 5 for i in range(30)]
    cold = engine.add(prompt, generate=1)
    ends = []
    while cold.phase is not Phase.FINISHED:
        (piece,) = engine.step().pieces
        ends.append(piece.tokens)
    assert ends == [8, 8, 8, 6]
    warm = engine.add(prompt[:13] + [4] * 17, generate=1)  # three blocks of it are known
    sizes = []
    while warm.phase is not Phase.FINISHED:
        (piece,) = engine.step().pieces
        sizes.append(piece.tokens)
    assert sizes == [4, 8, 6]
    assert warm.sources == {"hbm": 12, "recomputed": 18}


def test_a_repeated_prompt_computes_its_last_token_only() -> None:
    engine = FakeEngine(blocks=8)
    prompt = [1, 2, 0, 1] * 3 + [2]
    engine.add(prompt, generate=2)
    engine.run()
    again = engine.add(prompt, generate=2)
    (piece,) = engine.step().pieces
    assert piece.tokens == 1
    assert again.sources == {"hbm": 12, "recomputed": 1}


def test_a_prompt_of_full_blocks_computes_its_last_block_again() -> None:
    engine = FakeEngine(blocks=8)
    prompt = [1, 2, 0, 1] * 3
    engine.add(prompt, generate=1)
    engine.run()
    again = engine.add(prompt, generate=1)
    engine.run()
    assert again.sources == {"hbm": 8, "recomputed": 4}


def test_decoding_goes_on_while_a_long_prompt_is_prefilled() -> None:
    engine = FakeEngine(blocks=32, chunk_tokens=8)
    decoding = engine.add([1, 2], generate=20)
    engine.step()
    engine.add([2] * 30, generate=1)
    sizes = [[piece.tokens for piece in engine.step().pieces] for _ in range(4)]
    assert sizes == [[1, 8], [1, 8], [1, 8], [1, 6]]
    assert len(decoding.tokens) == 2 + 5


def test_prompts_share_the_budget_of_a_step_and_nobody_overtakes() -> None:
    engine = FakeEngine(blocks=32, chunk_tokens=8)
    for number, tokens in enumerate((6, 6, 2)):
        engine.add([number] * tokens, generate=1)
    sizes = [[piece.tokens for piece in engine.step().pieces] for _ in range(2)]
    assert sizes == [[6], [6, 2]]


@pytest.mark.parametrize("chunk_tokens", [8, 64])
def test_a_prefix_that_two_need_at_once_is_computed_once(chunk_tokens: int) -> None:
    engine = FakeEngine(blocks=32, chunk_tokens=chunk_tokens)
    prefix = [i % 7 for i in range(24)]
    first = engine.add([*prefix, 1], generate=1)
    second = engine.add([*prefix, 2], generate=1)
    engine.run()
    assert first.sources == {"recomputed": 25}
    assert second.sources == {"hbm": 24, "recomputed": 1}


def test_siblings_share_the_prompt_and_copy_on_write() -> None:
    engine = FakeEngine(blocks=16)
    prompt = [1, 2, 0, 1, 2, 2]  # one full block, one half full
    leader = engine.add(prompt, generate=6, width=3)
    copies = engine.step().copies
    assert copies == []
    assert engine.pool.used_blocks == 2
    copies = engine.step().copies
    assert len(copies) == 2, "the last of three writes in place"
    tables = [sequence.block_table for sequence in engine.scheduler.running]
    assert len({table[0] for table in tables}) == 1
    assert len({table[1] for table in tables}) == 3
    engine.run()
    for index in range(3):
        assert engine.finished[1, index] == continued(prompt, 12, index)
    assert leader.sources == {"recomputed": 6}


def test_siblings_count_against_the_batch_before_they_exist() -> None:
    engine = FakeEngine(blocks=32, max_batch=4)
    engine.add([1], generate=8)
    engine.add([2], generate=2, width=4)
    engine.step()
    assert len(engine.scheduler.running) == 1
    engine.run()
    assert len(engine.finished) == 5


def test_the_youngest_is_preempted_and_comes_back() -> None:
    engine = FakeEngine(blocks=6)
    engine.add([1] * 7, generate=16)
    engine.add([2] * 7, generate=16)
    engine.run()
    assert engine.scheduler.preemptions > 0
    assert {sequence.order for sequence in engine.demoted} == {(2, 0)}
    assert engine.finished[1, 0] == continued([1] * 7, 23, 0)
    assert engine.finished[2, 0] == continued([2] * 7, 23, 0)


def test_a_preempted_prompt_is_accounted_for_once() -> None:
    engine = FakeEngine(blocks=6)
    engine.add([1] * 7, generate=16)
    young = engine.add([2] * 7, generate=16)
    engine.run()
    assert sum(young.sources.values()) == 7


def test_a_newcomer_waits_until_those_who_run_can_grow() -> None:
    engine = FakeEngine(blocks=4)
    engine.add([1] * 4, generate=8)
    engine.step()
    engine.add([2] * 11, generate=1)  # three blocks: all that is free
    engine.step()
    assert len(engine.scheduler.waiting) == 1
    assert engine.scheduler.preemptions == 0


def test_what_loads_is_not_scheduled() -> None:
    engine = FakeEngine(blocks=8)
    loading = engine.add([1] * 5, generate=1)
    assert engine.scheduler.admit() is loading
    loading.phase = Phase.LOADING
    engine.add([2] * 5, generate=1)
    step = engine.step()
    assert [piece.sequence.order for piece in step.pieces] == [(2, 0)]
    loading.phase = Phase.RUNNING
    engine.run()
    assert len(engine.finished) == 2


def test_what_lies_before_the_blocks_that_load_is_computed_meanwhile() -> None:
    engine = FakeEngine(blocks=8)
    loading = engine.add([1] * 17, generate=1)
    assert engine.scheduler.admit() is loading
    loading.phase, loading.loading_from = Phase.LOADING, 3
    computed = [[piece.tokens for piece in engine.step().pieces] for _ in range(3)]
    assert computed == [[8], [4], []]
    loading.phase = Phase.RUNNING
    engine.run()
    assert len(engine.finished) == 1


def test_the_last_token_waits_as_well_until_all_has_come() -> None:
    engine = FakeEngine(blocks=8)
    loading = engine.add([1] * 17, generate=1)
    for _ in range(2):
        engine.step()
    assert loading.pending_tokens == 1
    loading.phase, loading.loading_from = Phase.LOADING, 2  # others have brought the rest
    assert engine.step().pieces == []


def test_nobody_is_preempted_for_blocks_that_will_be_free_without_it() -> None:
    engine = FakeEngine(blocks=8, chunk_tokens=32)
    old = engine.add([1] * 7, generate=16)
    engine.add([2] * 3, generate=16)
    gone = engine.add([0] * 8, generate=9)
    engine.step()
    engine.begin_copy(gone)
    engine.scheduler.remove(gone)
    while engine.step().pieces:
        assert old.phase is Phase.RUNNING
    assert engine.scheduler.preemptions == 0
    engine.end_copy(0)
    assert len(engine.step().pieces) == 2


@pytest.mark.parametrize("phase", [Phase.WAITING, Phase.RUNNING])
def test_an_aborted_sequence_leaves_nothing_behind(phase: Phase) -> None:
    engine = FakeEngine(blocks=8)
    sequence = engine.add([1] * 9, generate=5)
    if phase is Phase.RUNNING:
        engine.step()
    engine.scheduler.remove(sequence)
    engine.scheduler.check_invariants()
    assert engine.pool.used_blocks == 0
    assert engine.step().pieces == []


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests, aborts and steps in a pool that is too small for all of them."""

    @initialize(
        blocks=st.integers(8, 14), max_batch=st.integers(1, 5), chunk_tokens=st.integers(1, 11)
    )
    def start(self, blocks: int, max_batch: int, chunk_tokens: int) -> None:
        self.engine = FakeEngine(blocks, max_batch, chunk_tokens)
        self.max_batch = max_batch
        self.expected: dict[tuple[int, int], list[int]] = {}
        self.alive: list[TokenSequence] = []

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=18),
        generate=st.integers(1, 14),
        width=st.integers(1, 3),
    )
    def add(self, prompt: list[int], generate: int, width: int) -> None:
        width = min(width, self.max_batch)
        sequence = self.engine.add(prompt, generate, width)
        self.alive.append(sequence)
        for index in range(width):
            order = (self.engine.arrivals, index)
            self.expected[order] = continued(prompt, len(prompt) + generate, index)

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()
            self.engine.scheduler.check_invariants()

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.alive))
        self.alive.remove(sequence)
        if sequence.phase is not Phase.FINISHED:
            for index in range(sequence.width):
                self.expected.pop((sequence.order[0], sequence.index + index))
            self.engine.scheduler.remove(sequence)

    @rule()
    def clear(self) -> None:
        self.engine.pool.clear()

    @precondition(lambda self: self.engine.scheduler.running)
    @rule(data=st.data())
    def begin_copy(self, data: st.DataObject) -> None:
        self.engine.begin_copy(data.draw(st.sampled_from(self.engine.scheduler.running)))

    @precondition(lambda self: self.engine.copies)
    @rule(data=st.data())
    def end_copy(self, data: st.DataObject) -> None:
        self.engine.end_copy(data.draw(st.integers(0, len(self.engine.copies) - 1)))

    @invariant()
    def outputs_are_right(self) -> None:
        if hasattr(self, "engine"):
            for order, tokens in self.engine.finished.items():
                assert tokens == self.expected[order]

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.run()
            self.outputs_are_right()
            assert self.engine.finished.keys() == self.expected.keys()
            assert self.engine.pool.used_blocks == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_a_forked_chain_goes_its_own_way() -> None:
    chain = TokenChain(NAMESPACE, [1, 2, 3, 4, 5])
    other = chain.fork()
    chain.extend([6, 7, 8])
    other.extend([6, 7, 9])
    assert chain.chain(0, 1) == other.chain(0, 1)
    assert chain.chain(1).keys != other.chain(1).keys
    assert other.chain() == TokenChain(NAMESPACE, [1, 2, 3, 4, 5, 6, 7, 9]).chain()

"""Decoding from buffers that stay where they are: what CUDA graphs replay, here without graphs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch import Tensor

from kvstore.engine.attention import HostAttention
from kvstore.engine.decode_buffers import DecodeBuffers
from kvstore.engine.decode_steps import DecodeSteps, GraphCapture, step_sizes
from kvstore.engine.engine import Engine
from kvstore.engine.forward import Forward
from kvstore.engine.loading import LoadedModel
from kvstore.engine.sampling import SamplingParams
from kvstore.engine.sequence import TokenSequence
from kvstore.store import BlockStore
from kvstore.tiers.ram import RamTier
from tests.engine.delayed import DelayedCopies
from tests.engine.reference import BLOCK_TOKENS, GREEDY, PROMPTS, check, drain, engine_over


class Recorded:
    """A capture that notices when a repeated computation is given other tensors."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        compute()  # as a capture would: with whatever is in the buffers

        def replay() -> Tensor:
            self.runs += 1
            return compute()

        return replay


@contextmanager
def stepping_engine(
    model: LoadedModel, store: BlockStore | None = None, *, max_batch: int = 8, blocks: int = 256
) -> Iterator[tuple[Engine, Recorded]]:
    with engine_over(model, store, max_batch=max_batch, blocks=blocks) as engine:
        hbm, recorded = engine._loop.hbm, Recorded()
        attention = HostAttention(model.config, torch.device("cpu"))
        steps = DecodeSteps(
            model.decoder,
            hbm.kv,
            attention,
            recorded,
            max_batch=max_batch,
            block_tokens=BLOCK_TOKENS,
        )
        assert not hbm.kv.any(), "captured steps write to no block"
        engine._loop._forward = Forward(model.decoder, hbm, attention, steps)
        yield engine, recorded


@pytest.mark.parametrize("blocks", [24, 25, 40, 256])
@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_steps_give_the_models_own_answers(
    tiny: LoadedModel, expected: list[tuple[int, ...]], max_batch: int, blocks: int
) -> None:
    with stepping_engine(tiny, max_batch=max_batch, blocks=blocks) as (engine, recorded):
        for _ in range(2):
            check(engine.generate(PROMPTS, GREEDY), expected)
            engine.clear_hbm()
        assert recorded.runs > 20


def test_siblings_in_steps(tiny: LoadedModel) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.9, seed=5, n=4, ignore_eos=True)
    with engine_over(tiny, None) as engine:
        (right,) = engine.generate([PROMPTS[1]], params)
    with stepping_engine(tiny) as (engine, recorded):
        assert engine.generate([PROMPTS[1]], params)[0].completions == right.completions
        assert recorded.runs == 19


def test_between_steps_others_prefill_for_longer_than_a_block(
    tiny: LoadedModel, expected: list[tuple[int, ...]]
) -> None:
    """Block tables grow while no step is there to see it."""
    with stepping_engine(tiny) as (engine, recorded):
        first = engine.add_request(PROMPTS[4], GREEDY)
        deltas = [delta for _ in range(4) for delta in engine.step()]
        before = recorded.runs
        engine.add_request([5] * 150, SamplingParams(max_tokens=1, ignore_eos=True))
        deltas += [delta for _ in range(10) for delta in engine.step()]
        assert recorded.runs == before
        deltas += drain(engine)
        assert tuple(d.token_ids[0] for d in deltas if d.request_id == first) == expected[4]
        assert recorded.runs > before


def test_siblings_part_while_others_prefill(tiny: LoadedModel) -> None:
    """The shared block is in a row of a step; the block that replaces it comes without one."""
    prompt = PROMPTS[5][:21]  # all but the last token in five full blocks
    once = SamplingParams(max_tokens=1, ignore_eos=True)
    pair = SamplingParams(max_tokens=40, temperature=0.9, seed=5, n=2, ignore_eos=True)

    def answers(engine: Engine) -> dict[int, list[int]]:
        engine.generate([prompt], once)
        request = engine.add_request(prompt, pair)
        deltas = engine.step()
        engine.add_request([5] * 150, once)
        deltas += drain(engine)
        tokens: dict[int, list[int]] = {0: [], 1: []}
        for delta in deltas:
            if delta.request_id == request:
                tokens[delta.index] += delta.token_ids
        return tokens

    with engine_over(tiny, None) as engine:
        right = answers(engine)
    with stepping_engine(tiny) as (engine, recorded):
        assert answers(engine) == right
        assert recorded.runs > 20


@pytest.mark.parametrize("seed", range(3))
def test_steps_over_delayed_copies(
    tiny: LoadedModel, expected: list[tuple[int, ...]], seed: int
) -> None:
    chance = random.Random(seed)
    with (
        BlockStore(RamTier(4 << 20)) as store,
        stepping_engine(tiny, store, blocks=28, max_batch=5) as (engine, recorded),
    ):
        copies = DelayedCopies(engine._loop.hbm, {False: 1 << 30, True: 8 * 2048})
        tokens: dict[int, list[int]] = {}
        numbers: dict[int, int] = {}
        for _ in range(300):
            if chance.random() < 0.3 and len(numbers) < 25:
                number = chance.randrange(len(PROMPTS))
                request = engine.add_request(PROMPTS[number], GREEDY)
                numbers[request], tokens[request] = number, []
            for queue in (copies.outward, copies.inward):
                if queue and chance.random() < 0.4:
                    queue[0].run()
            for delta in engine.step():
                tokens[delta.request_id] += delta.token_ids
        for delta in drain(engine):
            tokens[delta.request_id] += delta.token_ids
        assert [tuple(tokens[r]) for r in numbers] == [expected[n] for n in numbers.values()]
        assert recorded.runs > 20
        assert engine.stats().counters["loaded_blocks"] > 10


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_capture_is_on_a_stream_of_its_own_device(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever device torch captured on before. CUDA's calls are recorded, and do nothing."""
    cuda = mock.MagicMock(Stream=lambda device: mock.MagicMock(device=device))
    monkeypatch.setattr("kvstore.engine.decode_steps.torch.cuda", cuda)
    GraphCapture(torch.device(device))(lambda: torch.zeros(1))
    ((warmed,), _), (_, captured) = cuda.stream.call_args, cuda.graph.call_args
    assert warmed is captured["stream"]
    assert warmed.device == torch.device(device)


def test_steps_of_all_sizes_leave_their_logits_in_one_place(tiny: LoadedModel) -> None:
    """A graph's own memory is the graph's for ever."""
    returned: list[Tensor] = []

    def capture(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        returned.append(compute())
        return compute

    kv = torch.zeros(2, 2, 2, 8 * BLOCK_TOKENS, 16)
    attention = HostAttention(tiny.config, kv.device)
    DecodeSteps(tiny.decoder, kv, attention, capture, max_batch=20, block_tokens=BLOCK_TOKENS)
    assert [len(logits) for logits in returned] == [24, 16, 8, 4]
    storages = {logits.untyped_storage().data_ptr() for logits in returned}
    assert storages == {returned[0].data_ptr()}
    assert returned[0].untyped_storage().nbytes() == returned[0].nbytes


def test_sizes_of_steps() -> None:
    assert step_sizes(1) == [4]
    assert step_sizes(5) == [4, 8]
    assert step_sizes(64)[-1] == 64
    for most in (*range(1, 300), 1000, 1024, 5000):
        sizes = step_sizes(most)
        assert sizes[-1] >= most
        assert all(b > a for a, b in pairwise(sizes))


def test_buffers_hold_what_the_sequences_have(tiny: LoadedModel) -> None:
    """Sequences come, grow, are replaced and go; rows are read back and compared."""
    with engine_over(tiny, None) as engine:
        namespace = engine.namespace
    chance = random.Random(3)
    buffers = DecodeBuffers(8, 40, BLOCK_TOKENS, torch.device("cpu"))
    alive: list[TokenSequence] = []
    for arrival in range(400):
        while len(alive) < chance.randrange(1, 9):
            sequence = TokenSequence(namespace, range(chance.randrange(1, 60)), arrival=arrival)
            sequence.computed_tokens = len(sequence.tokens) - 1
            sequence.block_table = chance.sample(range(1000), 1 + sequence.computed_blocks)
            alive.append(sequence)
        chance.shuffle(alive)
        running = alive[: chance.randrange(1, 9)]
        buffers.fill(running)
        size = len(running) + chance.randrange(9 - len(running))
        rows = buffers.rows(size)
        out = torch.zeros(size, dtype=torch.int64)
        order = buffers.in_order(torch.arange(size), out)[: len(running)].tolist()
        assert sorted(order) == list(range(len(running)))
        for row, sequence in zip(order, running, strict=True):
            position = sequence.computed_tokens
            assert int(rows.tokens[row]) == sequence.tokens[-1]
            assert int(rows.positions[row]) == position
            assert int(rows.context_lens[row]) == position + 1
            index, offset = divmod(position, BLOCK_TOKENS)
            block = sequence.block_table[index]
            assert int(rows.slots[row]) == block * BLOCK_TOKENS + offset
            assert rows.block_tables[row, : index + 1].tolist() == sequence.block_table[: index + 1]
        assert rows.slots[len(running) :].tolist() == [-1] * (size - len(running))
        assert not rows.context_lens[len(running) :].any()
        for sequence in alive:  # in steps of their own, too
            for _ in range(chance.randrange(7)):
                sequence.append(chance.randrange(256))
                sequence.computed_tokens += 1
                if sequence.computed_tokens // BLOCK_TOKENS == len(sequence.block_table):
                    sequence.block_table.append(chance.randrange(1000))
        alive = [s for s in alive if chance.random() < 0.8 and len(s.tokens) < 120]
        for sequence in alive:
            if chance.random() < 0.1:
                sequence.block_table = chance.sample(range(1000), len(sequence.block_table))

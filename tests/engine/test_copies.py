"""Copies that take their time: no block is read before its load, or reused before its store."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.engine.engine import Engine
from kvstore.engine.loading import LoadedModel, load
from kvstore.engine.sampling import SamplingParams
from kvstore.engine.sequence import Phase
from kvstore.hashing import TokenChain
from kvstore.store import BlockStore
from kvstore.tiers.hbm import HbmTier
from kvstore.tiers.hbm_copies import UNBOUNDED, CopyEvent, HostCopies
from kvstore.tiers.ram import RamTier
from tests.engine.delayed import ALWAYS, NEVER, DelayedCopies
from tests.engine.reference import (
    GREEDY,
    LONG,
    PROMPTS,
    block_bytes,
    check,
    drain,
    engine_over,
    sources,
)
from tests.engine.tiny import tiny_model
from tests.engine.traffic import Traffic

SLOT_BYTES = 4096  # of RAM, for a block of 2 KiB
# When loads are made layer by layer while the sequence runs: how many bytes, by whether others do.
ALONE = {False: UNBOUNDED, True: 0}
SMALL = {False: UNBOUNDED, True: 8 * 2048}


@contextmanager
def delayed_engine(
    model: LoadedModel,
    store: BlockStore,
    *,
    gated: dict[bool, int] = NEVER,
    blocks: int = 256,
    max_batch: int = 8,
) -> Iterator[tuple[Engine, DelayedCopies]]:
    with engine_over(model, store, blocks=blocks, max_batch=max_batch) as engine:
        yield engine, DelayedCopies(engine._loop.hbm, gated)


@pytest.fixture
def store() -> Iterator[BlockStore]:
    with BlockStore(RamTier(4 << 20)) as store:
        yield store


def test_a_block_is_in_the_store_when_its_copy_is_over_and_not_before(
    tiny: LoadedModel, store: BlockStore
) -> None:
    with delayed_engine(tiny, store) as (engine, copies):
        engine.add_request(LONG, SamplingParams(max_tokens=8, ignore_eos=True))
        for _ in range(4):  # chunks of 16, then 2
            engine.step()
        known = TokenChain(engine.namespace, LONG).chain()
        assert store.probe(known).prefix == 0
        assert len(copies.outward) == 3
        copies.outward[1].run()
        assert store.probe(known).prefix == 0, "nobody has looked"
        engine.step()
        assert store.probe(known).prefix == 8
        assert copies.waits == 0
        drain(engine)
        assert store.probe(known).prefix == 12
        assert not engine.busy


def test_an_engine_that_has_answered_has_stored(
    tiny: LoadedModel, expected: list[tuple[int, ...]], store: BlockStore
) -> None:
    with delayed_engine(tiny, store) as (engine, copies):
        check(engine.generate(PROMPTS, GREEDY), expected)
        assert not copies.outward
        stream = engine.stream([1, 2, 3, 4, 5], GREEDY)
        next(stream)
        stream.close()
        assert not copies.outward
        for prompt, answer in zip(PROMPTS, expected, strict=True):
            tokens = [*prompt, *answer[:-1]]
            assert store.probe(TokenChain(engine.namespace, tokens).chain()).prefix == (
                len(tokens) // 4
            )


def test_others_decode_while_blocks_arrive(
    tiny: LoadedModel, expected: list[tuple[int, ...]], store: BlockStore
) -> None:
    with engine_over(tiny, store) as engine:
        engine.generate([LONG], GREEDY)
    with delayed_engine(tiny, store) as (engine, copies):
        decoding = engine.add_request(PROMPTS[4], GREEDY)
        engine.step()
        loading = engine.add_request(LONG, GREEDY)
        tokens: dict[int, list[int]] = {decoding: [], loading: []}
        for _ in range(10):
            for delta in engine.step():
                tokens[delta.request_id] += delta.token_ids
        assert len(tokens[decoding]) == 10
        assert engine.stats().loading == 1
        assert copies.waits == 0
        copies.inward[-1].run()
        tail = [d.token_ids[0] for d in drain(engine) if d.request_id == loading]
        assert tuple(tail) == expected[0]


def test_an_aborted_load_keeps_its_blocks_until_its_copy_is_over(
    tiny: LoadedModel, store: BlockStore
) -> None:
    with engine_over(tiny, store) as engine:
        engine.generate([LONG], GREEDY)
    with delayed_engine(tiny, store) as (engine, copies):
        engine.add_request([7], SamplingParams(max_tokens=99, ignore_eos=True))
        engine.step()
        request = engine.add_request(LONG, GREEDY)
        engine.step()
        used = engine.stats().hbm_used_blocks
        engine.abort(request)
        assert engine.stats().hbm_used_blocks == used - 1, "the block that nothing is copied to"
        assert store.stats().ram["pinned_blocks"] == 12
        copies.inward[-1].run()
        engine.step()
        assert store.stats().ram["pinned_blocks"] == 0
        assert engine.stats().hbm_used_blocks < used - 10
        drain(engine)


def test_an_engine_that_is_closed_waits_for_its_copies(
    tiny: LoadedModel, store: BlockStore
) -> None:
    engine = Engine(tiny, store=store, hbm_bytes=99 * block_bytes(tiny), block_tokens=4)
    copies = DelayedCopies(engine._loop.hbm, NEVER)
    engine.add_request(LONG, GREEDY)
    engine.step()
    assert copies.outward
    engine.close()
    assert not copies.outward
    assert store.probe(TokenChain(engine.namespace, LONG).chain()).prefix == 12


@pytest.fixture
def deep(tmp_path: Path) -> LoadedModel:
    """Five layers."""
    return load(tiny_model(tmp_path / "deep", num_hidden_layers=5), torch.float32)


def test_a_layer_attends_before_the_next_has_arrived(deep: LoadedModel, store: BlockStore) -> None:
    with engine_over(deep, store) as engine:
        (cold,) = engine.generate([LONG], GREEDY)
    with delayed_engine(deep, store, gated=ALONE) as (engine, copies):
        engine.add_request(LONG, GREEDY)
        (delta,) = engine.step()  # a token at once, though no copy was over when it was asked for
        assert delta.token_ids == cold.token_ids[:1]
        assert (copies.preceded, copies.waits) == (5, 0)
        assert [event.layers for event in copies.made] == [range(i, i + 1) for i in range(5)]
        (usage,) = (d.usage for d in drain(engine) if d.usage is not None)
        assert sources(usage) == (0, 48, 0, 0, 2)


def test_no_layer_is_waited_for_by_those_who_could_not_care_less(
    deep: LoadedModel, store: BlockStore
) -> None:
    """A copy too large for others to wait for: they decode, and it comes when it comes."""
    with engine_over(deep, store) as engine:
        engine.generate([LONG], GREEDY)
    with delayed_engine(deep, store, gated=ALONE) as (engine, copies):
        engine.add_request([7], SamplingParams(max_tokens=30, ignore_eos=True))
        engine.step()
        engine.add_request(LONG, GREEDY)
        for _ in range(5):
            assert len(engine.step()) == 1
        assert (copies.preceded, copies.waits, len(copies.inward)) == (0, 0, 1)
        drain(engine)


def test_a_small_copy_behind_a_large_one_is_not_waited_for(
    deep: LoadedModel, store: BlockStore
) -> None:
    small = [5] * 9  # two blocks that can be found
    once = SamplingParams(max_tokens=1, ignore_eos=True)
    with engine_over(deep, store) as engine:
        engine.generate([LONG, small], GREEDY)
    gated = {False: UNBOUNDED, True: 4 * block_bytes(deep)}
    with delayed_engine(deep, store, gated=gated) as (engine, copies):
        engine.add_request([7], SamplingParams(max_tokens=30, ignore_eos=True))
        engine.step()
        engine.add_request(LONG, once)
        engine.step()
        engine.add_request(small, once)
        for _ in range(3):
            assert len(engine.step()) == 1
        assert (copies.preceded, copies.waits, len(copies.inward)) == (0, 0, 2)
        copies.inward[-1].run()
        assert len(engine.step()) == 3
        engine.clear_hbm()
        engine.add_request(small, once)  # nothing is before it now
        assert len(engine.step()) == 2
        assert (copies.preceded, copies.waits) == (5, 0)
        drain(engine)


def test_of_two_that_nobody_waits_for_the_first_does_not_wait_for_the_second(
    deep: LoadedModel, store: BlockStore
) -> None:
    others = [9] * 50
    once = SamplingParams(max_tokens=1, ignore_eos=True)
    with engine_over(deep, store) as engine:
        engine.generate([LONG, others], once)
    with delayed_engine(deep, store, gated=ALONE) as (engine, copies):
        first = engine.add_request(LONG, once)
        engine.add_request(others, once)
        assert [delta.request_id for delta in engine.step()] == [first]
        assert (copies.preceded, copies.waits, len(copies.inward)) == (5, 0, 1)
        drain(engine)


@pytest.mark.parametrize("gated", [NEVER, ALONE, SMALL, ALWAYS])
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_copies_gives_the_same_answers_and_blocks(
    tiny: LoadedModel, expected: list[tuple[int, ...]], seed: int, gated: dict[bool, int]
) -> None:
    """HBM far too small for the requests, RAM far too small for their blocks."""
    blocks = 24 + 5 * (seed % 4)
    with (
        BlockStore(RamTier((40 + 30 * (seed % 3)) * SLOT_BYTES)) as store,
        delayed_engine(tiny, store, gated=gated, blocks=blocks, max_batch=2 + 2 * seed) as (
            engine,
            copies,
        ),
    ):
        traffic = Traffic(engine, store, seed, expected)
        traffic.run(400, copies.run_some)
        traffic.check()
        assert engine.stats().counters["offloaded_blocks"] > 20
        assert engine.stats().counters["loaded_blocks"] > 20
        assert engine.stats().preemptions > 0
        assert "store_errors" not in engine.stats().counters
        _check_blocks(tiny, store, expected)


class Failing(HostCopies):
    """Copies of which some get half way, and leave behind what is no KV."""

    def __init__(self, hbm: HbmTier, chance: random.Random) -> None:
        super().__init__(hbm.kv, hbm.layout)
        self._hbm, self._chance = hbm, chance
        hbm.copies = self

    def copy_out(self, blocks: Sequence[int], views: Sequence[memoryview]) -> CopyEvent:
        if self._chance.random() < 0.3:
            views[0][:] = b"\xa5" * len(views[0])
            raise MemoryError("half way out")
        return super().copy_out(blocks, views)

    def copy_in(self, blocks: Sequence[int], views: Sequence[memoryview]) -> CopyEvent:
        if self._chance.random() < 0.3:
            tokens = self._hbm.layout.block_tokens
            self._hbm.kv[:, :, :, blocks[0] * tokens : (blocks[0] + 1) * tokens] = torch.nan
            raise MemoryError("half way in")
        return super().copy_in(blocks, views)


@pytest.mark.parametrize("seed", range(3))
def test_copies_that_cannot_be_started_cost_hits_and_nothing_else(
    tiny: LoadedModel, expected: list[tuple[int, ...]], seed: int
) -> None:
    with (
        BlockStore(RamTier(60 * SLOT_BYTES)) as store,
        engine_over(tiny, store, blocks=32, max_batch=4) as engine,
    ):
        Failing(engine._loop.hbm, random.Random(seed))
        traffic = Traffic(engine, store, seed, expected)
        traffic.run(200, lambda chance: None)
        traffic.check()
        counters = engine.stats().counters
        assert min(counters["store_errors"], counters["loaded_blocks"]) > 10
        assert store.stats().ram["pinned_blocks"] == 0
        _check_blocks(tiny, store, expected)


def _check_blocks(
    model: LoadedModel, store: BlockStore, expected: Sequence[tuple[int, ...]]
) -> None:
    """What is in the store is, bit for bit, what an engine without delays stores."""
    compared = 0
    with BlockStore(RamTier(4 << 20)) as other, engine_over(model, other) as engine:
        engine.generate(PROMPTS, GREEDY)
        for prompt, answer in zip(PROMPTS, expected, strict=True):
            chain = TokenChain(engine.namespace, [*prompt, *answer]).chain()
            with store.acquire(chain) as got, other.acquire(chain) as right:
                assert len(got) <= len(right)
                for one, two in zip(got.views, right.views, strict=False):
                    assert bytes(one) == bytes(two)
                    compared += 1
    assert compared


class Replaced:
    """A store that others stand for: a daemon that was started again, empty."""

    def __init__(self, store: BlockStore) -> None:
        self.now = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.now, name)


def test_what_has_not_arrived_is_not_stored_elsewhere(deep: LoadedModel, store: BlockStore) -> None:
    """Demoted to an empty store before its load was over: what would be copied is not there."""
    with engine_over(deep, store) as engine:
        engine.generate([LONG], GREEDY)
    replaced: Any = Replaced(store)
    with (
        BlockStore(RamTier(4 << 20)) as other,
        delayed_engine(deep, replaced, gated=ALONE) as (engine, copies),
    ):
        engine.generate([LONG[:9]], SamplingParams(max_tokens=1))  # two blocks into HBM
        engine.add_request(LONG, GREEDY)
        engine._loop._admit()  # all layers are on their way, and the sequence is to run
        (sequence,) = engine._loop._scheduler.running
        assert (sequence.phase, sequence.computed_blocks) == (Phase.RUNNING, 12)
        replaced.now = other
        assert engine._loop._offload is not None
        engine._loop._offload.demote(sequence)
        assert not copies.outward
        drain(engine)


def test_what_is_leaving_does_not_leave_twice(tiny: LoadedModel, store: BlockStore) -> None:
    with delayed_engine(tiny, store) as (engine, copies):
        engine.add_request(LONG, GREEDY)
        for _ in range(4):
            engine.step()
        started = len(copies.outward)
        (sequence,) = engine._loop._scheduler.running
        assert engine._loop._offload is not None
        engine._loop._offload.demote(sequence)
        assert len(copies.outward) == started
        drain(engine)


def test_siblings_over_delayed_copies(tiny: LoadedModel, store: BlockStore) -> None:
    params = SamplingParams(max_tokens=12, n=3, temperature=1.0, seed=2, ignore_eos=True)
    with engine_over(tiny, None) as engine:
        (cold,) = engine.generate([LONG], params)
    with delayed_engine(tiny, store) as (engine, _):
        assert engine.generate([LONG], params)[0].completions == cold.completions
        engine.clear_hbm()
        (warm,) = engine.generate([LONG], params)
        assert warm.completions == cold.completions
        assert sources(warm.usage) == (0, 48, 0, 0, 2)

"""The engine with a store: any mix of tiers gives the same answers, and all is accounted for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import kvstore
from kvstore.engine.loading import LoadedModel, load
from kvstore.engine.sampling import SamplingParams
from kvstore.hashing import TokenChain
from kvstore.store import BlockStore
from kvstore.tiers.ram import RamTier
from tests.engine.reference import (
    BLOCK_TOKENS,
    GREEDY,
    LONG,
    PROMPTS,
    check,
    drain,
    engine_over,
    greedy,
    sources,
)
from tests.engine.tiny import tiny_model


@pytest.fixture
def store() -> Iterator[BlockStore]:
    """RAM only, and room for everything."""
    with BlockStore(RamTier(4 << 20)) as store:
        yield store


def nvme_store(folder: Path, ram_bytes: int | str = "4 MiB") -> BlockStore:
    return kvstore.open(ram_bytes=ram_bytes, nvme_path=folder, nvme_bytes="16 MiB")


def reusable(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Tokens of each prompt that can come from a cache: full blocks before the last token."""
    return [(len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS for prompt in prompts]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, tiny_path: Path) -> LoadedModel:
    return load(tiny_path, {"float32": torch.float32, "bfloat16": torch.bfloat16}[request.param])


@pytest.fixture(scope="module")
def answers(model: LoadedModel) -> list[tuple[int, ...]]:
    return [greedy(model, prompt, 24) for prompt in PROMPTS]


@pytest.mark.parametrize("max_batch", [1, 8])
@pytest.mark.parametrize("chunk", [5, 16, 512])
def test_every_mix_of_hits_gives_the_answers_of_none(
    model: LoadedModel,
    answers: list[tuple[int, ...]],
    tmp_path: Path,
    chunk: int,
    max_batch: int,
) -> None:
    options = {"max_batch": max_batch, "prefill_chunk_tokens": chunk}
    with nvme_store(tmp_path) as store, engine_over(model, store, **options) as engine:
        cold = engine.generate(PROMPTS, GREEDY)
        hbm = engine.generate(PROMPTS, GREEDY)
        engine.clear_hbm()
        ram = engine.generate(PROMPTS, GREEDY)
        engine.clear_hbm()
        store.flush()  # what is being written to the drive is pinned, and would not go
        for prompt in PROMPTS:  # leave the first three blocks of each
            store.evict(TokenChain(engine.namespace, prompt).chain(3))
        part = engine.generate(PROMPTS, GREEDY)
        for outputs in (cold, hbm, ram, part):
            check(outputs, answers)
        assert [output.usage.hbm_tokens for output in hbm] == reusable(PROMPTS)
        for output, tokens in zip(ram, reusable(PROMPTS), strict=True):
            assert output.usage.ram_tokens + output.usage.hbm_tokens == tokens
        assert part[0].usage.ram_tokens == 3 * BLOCK_TOKENS
    with nvme_store(tmp_path) as store, engine_over(model, store, **options) as engine:
        nvme = engine.generate(PROMPTS, GREEDY)
        check(nvme, answers)
        assert nvme[0].usage.nvme_tokens == reusable([LONG])[0]


def test_a_prompt_comes_from_three_tiers_and_the_model(
    tiny: LoadedModel, expected: list[tuple[int, ...]], tmp_path: Path
) -> None:
    with nvme_store(tmp_path) as store, engine_over(tiny, store) as engine:
        engine.generate([LONG[:41]], SamplingParams(max_tokens=1))
    with nvme_store(tmp_path) as store, engine_over(tiny, store) as engine:
        engine.generate([LONG[:21]], SamplingParams(max_tokens=1))  # five blocks into RAM
        engine.clear_hbm()
        engine.generate([LONG[:9]], SamplingParams(max_tokens=1))  # two of them into HBM
        outputs = engine.generate([LONG], GREEDY)
        check(outputs, expected[:1])
        assert sources(outputs[0].usage) == (8, 12, 20, 0, 10)


def test_a_load_is_as_exact_as_the_bytes(
    tiny: LoadedModel, expected: list[tuple[int, ...]], store: BlockStore
) -> None:
    """If a load put bytes into the wrong place, or none, this is where it would show."""
    with engine_over(tiny, store) as engine:
        engine.generate([LONG], GREEDY)
        chain = TokenChain(engine.namespace, LONG).chain(0, 12)
        with store.acquire(chain) as lease:
            right = [bytes(view) for view in lease.views]
        assert len(set(right)) == 12
        store.evict(chain)
        with store.reserve(chain) as reservation:
            for view in reservation.views:
                view[:] = bytes(len(view))
            reservation.commit()
        engine.clear_hbm()
        (wrong,) = engine.generate([LONG], GREEDY)
        assert wrong.usage.ram_tokens == 48
        assert wrong.token_ids != expected[0]


def test_siblings_after_a_load(tiny: LoadedModel, store: BlockStore) -> None:
    params = SamplingParams(max_tokens=12, n=3, temperature=1.0, seed=2, ignore_eos=True)
    with engine_over(tiny, None) as engine:
        (cold,) = engine.generate([LONG], params)
    with engine_over(tiny, store) as engine:
        engine.generate([LONG], GREEDY)
        engine.clear_hbm()
        (warm,) = engine.generate([LONG], params)
        assert store.stats().ram["pinned_blocks"] == 0
    assert warm.completions == cold.completions
    assert sources(warm.usage) == (0, 48, 0, 0, 2)


def test_the_same_prompt_is_loaded_once_for_many(
    tiny: LoadedModel, expected: list[tuple[int, ...]], store: BlockStore
) -> None:
    with engine_over(tiny, store) as engine:
        engine.generate([LONG], GREEDY)
        engine.clear_hbm()
        outputs = engine.generate([LONG] * 4, GREEDY)
        check(outputs, [expected[0]] * 4)
        assert sorted(sources(output.usage) for output in outputs) == [
            (0, 48, 0, 0, 2),
            *[(48, 0, 0, 0, 2)] * 3,
        ]


@pytest.mark.parametrize("blocks", [24, 25, 40])
def test_preempted_sequences_come_back_from_the_store(
    tiny: LoadedModel, expected: list[tuple[int, ...]], store: BlockStore, blocks: int
) -> None:
    with engine_over(tiny, store, blocks=blocks) as engine:
        check(engine.generate(PROMPTS, GREEDY), expected)
        stats = engine.stats()
        assert stats.preemptions > 0
        # A few tokens at the end of the last block are not stored; nothing else is computed twice.
        assert stats.counters["loaded_blocks"] > 0


def test_what_the_store_has_lost_is_offered_again_at_preemption(
    tiny: LoadedModel, expected: list[tuple[int, ...]], store: BlockStore
) -> None:
    with engine_over(tiny, store, blocks=25) as engine:
        old = engine.stream(PROMPTS[5], GREEDY)
        tokens = next(old).token_ids
        young = engine.add_request(PROMPTS[2], GREEDY)
        known = TokenChain(engine.namespace, PROMPTS[2] + list(expected[2])).chain()
        while engine.stats().preemptions == 0:
            store.evict(known)
            tokens += next(old).token_ids
        assert store.probe(known).prefix >= 1
        deltas = [delta for delta in drain(engine) if delta.request_id == young]
        assert tokens + tuple(t for delta in old for t in delta.token_ids) == expected[5]
        assert tuple(t for delta in deltas for t in delta.token_ids)[-10:] == expected[2][-10:]


def test_preemption_without_room_in_the_store_computes_again(
    tiny: LoadedModel, expected: list[tuple[int, ...]]
) -> None:
    with BlockStore(RamTier(4 * 4096)) as store, engine_over(tiny, store, blocks=24) as engine:
        check(engine.generate(PROMPTS, GREEDY), expected)
        assert engine.stats().preemptions > 0


def test_blocks_are_stored_as_they_fill(tiny: LoadedModel, store: BlockStore) -> None:
    with engine_over(tiny, store) as engine:
        tokens, held = [9], []
        for delta in engine.stream([9], SamplingParams(max_tokens=24, ignore_eos=True)):
            tokens += delta.token_ids
            held.append(store.probe(TokenChain(engine.namespace, tokens).chain()).prefix)
        # The newest token has been drawn, but its KV has not been computed.
        assert held == [count // BLOCK_TOKENS for count in range(1, 25)]


def test_engines_of_one_model_share_a_store(
    tiny: LoadedModel, expected: list[tuple[int, ...]], store: BlockStore
) -> None:
    with engine_over(tiny, store) as one, engine_over(tiny, store) as other:
        check(one.generate([LONG], GREEDY), expected[:1])
        outputs = other.generate([LONG], GREEDY)
        check(outputs, expected[:1])
        assert outputs[0].usage.ram_tokens == 48


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"salt": "another tenant"}, "salt"),
        ({"block_tokens": 8}, "block_tokens"),
        ({"dtype": torch.bfloat16}, "kv_dtype"),
        ({"rope_theta": 50_000.0}, "rope"),
        ({"seed": 1}, "weights"),
    ],
)
def test_what_is_not_the_same_is_not_found(
    tiny: LoadedModel, store: BlockStore, tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    with engine_over(tiny, store) as engine:
        engine.generate([LONG], GREEDY)
    dtype = changed.pop("dtype", torch.float32)
    fields = {name: changed.pop(name) for name in ("seed", "rope_theta") if name in changed}
    model = load(tiny_model(tmp_path / "tiny", **fields), dtype)
    with engine_over(model, store, **changed) as engine:
        (output,) = engine.generate([LONG], GREEDY)
        assert output.usage.recomputed_tokens == 50
        store.evict(TokenChain(engine.namespace, LONG).chain())
        explained = store.explain(TokenChain(engine.namespace, LONG).chain())
        assert explained.present == 0
    with engine_over(model, None, **changed) as engine:
        assert engine.generate([LONG], GREEDY)[0].token_ids == output.token_ids


def test_loading_is_declined_when_computing_is_faster(
    tiny: LoadedModel, expected: list[tuple[int, ...]], tmp_path: Path
) -> None:
    with nvme_store(tmp_path) as store, engine_over(tiny, store) as engine:
        engine.generate([LONG], GREEDY)
    with nvme_store(tmp_path) as store, engine_over(tiny, store) as engine:
        engine.generate([PROMPTS[5]], GREEDY)  # the engine knows its own speed now
        store.load_costs["nvme"].observe(1, 1, 1e6)
        outputs = engine.generate([LONG], GREEDY)
        check(outputs, expected[:1])
        assert outputs[0].usage.nvme_tokens == 0
        assert engine.stats().counters["too_slow_blocks"] == 12


def test_what_waits_is_prefetched(
    tiny: LoadedModel, expected: list[tuple[int, ...]], tmp_path: Path
) -> None:
    with nvme_store(tmp_path) as store, engine_over(tiny, store) as engine:
        engine.generate([LONG], GREEDY)
    with nvme_store(tmp_path) as store, engine_over(tiny, store, max_batch=1) as engine:
        first = engine.stream(PROMPTS[5], GREEDY)
        next(first)
        engine.add_request(LONG, GREEDY)
        next(first)
        assert engine.stats().counters["prefetched_blocks"] == 12
        chain = TokenChain(engine.namespace, LONG).chain()
        with store.acquire(chain) as lease:
            assert lease.wait() == 12
        list(first)
        deltas = drain(engine)
        assert tuple(t for delta in deltas for t in delta.token_ids) == expected[0]
        assert deltas[-1].usage is not None
        assert sources(deltas[-1].usage) == (0, 48, 0, 0, 2)

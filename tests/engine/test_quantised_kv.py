"""KV of one byte an element: the engine gives the same answers from every tier and in any company.

What these answers are worth beside those of KV that is kept as it is computed is measured by
benchmarks/quantised.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import kvstore
from kvstore.engine.attention import HostAttention
from kvstore.engine.batch import Batch, SequenceSpan
from kvstore.engine.calibration import KV_DTYPES, Quantised, calibrate
from kvstore.engine.loading import LoadedModel, load
from kvstore.engine.sampling import SamplingParams
from kvstore.errors import SettingsError
from kvstore.hashing import TokenChain
from kvstore.store import BlockStore
from kvstore.tiers.hbm import TORCH_DTYPE
from kvstore.tiers.ram import RamTier
from tests.engine.reference import (
    BLOCK_TOKENS,
    GREEDY,
    LONG,
    PROMPTS,
    check,
    engine_over,
    greedy,
)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest, tiny_path: Path) -> LoadedModel:
    return load(tiny_path, request.param)


@pytest.fixture(scope="module", params=list(KV_DTYPES))
def kv_dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def kept(model: LoadedModel, kv_dtype: str) -> Quantised:
    return calibrate(model, KV_DTYPES[kv_dtype])


@pytest.fixture(scope="module")
def answers(model: LoadedModel, kept: Quantised) -> list[tuple[int, ...]]:
    return [greedy(model, prompt, 24, kept) for prompt in PROMPTS]


@pytest.fixture
def store() -> Iterator[BlockStore]:
    with BlockStore(RamTier(4 << 20)) as store:
        yield store


@pytest.mark.parametrize(
    ("model", "kv_dtype", "chunk", "max_batch"),
    [  # Of every two of them, each pair.
        (torch.float32, "fp8", 5, 8),
        (torch.float32, "int8", 16, 1),
        (torch.float32, "fp8", 512, 8),
        (torch.bfloat16, "int8", 5, 8),
        (torch.bfloat16, "fp8", 16, 1),
        (torch.bfloat16, "int8", 512, 8),
    ],
    indirect=["model", "kv_dtype"],
)
def test_every_tier_gives_the_answers_of_none(
    model: LoadedModel,
    kv_dtype: str,
    answers: list[tuple[int, ...]],
    tmp_path: Path,
    chunk: int,
    max_batch: int,
) -> None:
    def nvme_store() -> BlockStore:
        return kvstore.open(ram_bytes="4 MiB", nvme_path=tmp_path, nvme_bytes="16 MiB")

    options: dict[str, Any] = {
        "max_batch": max_batch,
        "prefill_chunk_tokens": chunk,
        "kv_dtype": kv_dtype,
    }
    with nvme_store() as store, engine_over(model, store, **options) as engine:
        check(engine.generate(PROMPTS, GREEDY), answers)
        check(engine.generate(PROMPTS, GREEDY), answers)
        engine.clear_hbm()
        warm = engine.generate(PROMPTS, GREEDY)
        check(warm, answers)
        assert warm[0].usage.ram_tokens == 48
    with nvme_store() as store, engine_over(model, store, **options) as engine:
        cold = engine.generate(PROMPTS, GREEDY)
        check(cold, answers)
        assert cold[0].usage.nvme_tokens == 48


@pytest.mark.parametrize("blocks", [6, 10])
def test_constant_eviction_and_reload(
    model: LoadedModel,
    kv_dtype: str,
    answers: list[tuple[int, ...]],
    store: BlockStore,
    blocks: int,
) -> None:
    """`blocks` are counted as if KV were float32: there are four times as many."""
    with engine_over(model, store, blocks=blocks, kv_dtype=kv_dtype) as engine:
        check(engine.generate(PROMPTS, GREEDY), answers)
        assert engine.stats().preemptions > 0
        assert engine.stats().counters["loaded_blocks"] > 0


def test_siblings_copy_on_write(tiny: LoadedModel, kv_dtype: str, store: BlockStore) -> None:
    params = SamplingParams(max_tokens=12, n=3, temperature=1.0, seed=2, ignore_eos=True)
    with engine_over(tiny, None, kv_dtype=kv_dtype) as engine:
        (cold,) = engine.generate([LONG], params)
        alone = [engine.generate([LONG], replace(params, n=1))[0] for _ in range(2)]
    assert [a.completions for a in alone] == [cold.completions[:1]] * 2
    with engine_over(tiny, store, kv_dtype=kv_dtype) as engine:
        engine.generate([LONG], GREEDY)
        engine.clear_hbm()
        assert engine.generate([LONG], params)[0].completions == cold.completions


def test_stored_bytes_are_those_in_hbm(
    model: LoadedModel, kv_dtype: str, store: BlockStore
) -> None:
    """One byte an element, bit by bit: there, in the store, and back in another place."""
    c = model.config
    with engine_over(model, store, kv_dtype=kv_dtype) as engine:
        engine.generate([LONG], SamplingParams(max_tokens=1))
        chain = TokenChain(engine.namespace, LONG).chain()
        hbm = blocks_in(engine._loop.hbm.kv)
        with store.acquire(chain) as lease:
            assert lease.wait() == 12
            stored = [bytes(view) for view in lease.views]
        assert {len(block) for block in stored} == {
            c.kv_heads * c.layers * 2 * BLOCK_TOKENS * c.head_dim
        }
        assert set(stored) <= set(hbm)
        assert len(set(stored)) == 12
        engine.clear_hbm()
        engine.generate([PROMPTS[5]], SamplingParams(max_tokens=1))  # takes other places
        (output,) = engine.generate([LONG], SamplingParams(max_tokens=1))
        assert output.usage.ram_tokens == 48
        assert set(stored) <= set(blocks_in(engine._loop.hbm.kv))


def blocks_in(kv: torch.Tensor) -> list[bytes]:
    """Every block of the KV tensor in canonical order."""
    bits = kv.view(torch.uint8)
    count = bits.shape[3] // BLOCK_TOKENS
    places = (bits[:, :, :, i * BLOCK_TOKENS : (i + 1) * BLOCK_TOKENS] for i in range(count))
    return [place.contiguous().numpy().tobytes() for place in places]


@pytest.mark.parametrize("cuts", [[0, 150], [0, 1, 2, 150], [0, 37, 128, 149, 150], [0, 64, 150]])
def test_the_same_bits_however_a_prompt_is_cut(
    model: LoadedModel, kept: Quantised, cuts: list[int]
) -> None:
    tokens = [i * 13 % 256 for i in range(150)]
    assert_same(compute(model, kept, tokens, cuts), compute(model, kept, tokens, [0, 150]))


def test_the_same_bits_in_any_company(model: LoadedModel, kept: Quantised) -> None:
    tokens = [i * 13 % 256 for i in range(150)]
    alone = compute(model, kept, tokens, [0, 100, 149, 150])
    crowd = [[i * step % 256 for i in range(step * 9)] for step in (3, 11, 17)]
    assert_same(compute(model, kept, tokens, [0, 100, 149, 150], crowd), alone)


Computed = tuple[torch.Tensor, torch.Tensor]


def compute(
    model: LoadedModel,
    kept: Quantised,
    tokens: list[int],
    cuts: list[int],
    others: list[list[int]] | None = None,
) -> Computed:
    """Logits of the last token and the bits of all KV, computed in pieces, beside others."""
    c, places, others = model.config, 600, others or []
    shape = (c.kv_heads, c.layers, 2, places * (1 + len(others)), c.head_dim)
    kv = torch.zeros(shape, dtype=TORCH_DTYPE[kept.dtype])
    attention = HostAttention(c, kv.device, kept.scales)
    logits = torch.empty(0)
    for start, stop in pairwise(cuts):
        spans = [SequenceSpan(stop - start, start, range(places))]
        pieces = [tokens[start:stop]]
        for number, other in enumerate(others, 1):
            table = range(number * places, (number + 1) * places)
            spans.append(SequenceSpan(len(other), 0, table))
            pieces.append(other)
        batch = Batch.build(spans, pieces, block_tokens=1)
        logits = model.decoder.forward(batch, kv, attention=attention)[0]
    return logits, kv.view(torch.int8)[:, :, :, : len(tokens)]


def assert_same(one: Computed, other: Computed) -> None:
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert other[1].any(-1).all()


@pytest.mark.parametrize("other", ["auto", "fp8", "int8"])
def test_engines_that_keep_kv_otherwise_share_nothing(
    tiny: LoadedModel, store: BlockStore, other: str
) -> None:
    with engine_over(tiny, store, kv_dtype="int8") as engine:
        engine.generate([LONG], GREEDY)
    with engine_over(tiny, store, kv_dtype=other) as engine:
        (output,) = engine.generate([LONG], GREEDY)
        assert output.usage.ram_tokens == (48 if other == "int8" else 0)


def test_nobody_knows_fp4(tiny: LoadedModel) -> None:
    with pytest.raises(SettingsError, match="kv_dtype 'fp4' is not one of auto, fp8, int8"):
        kvstore.Engine(tiny, kv_dtype="fp4")

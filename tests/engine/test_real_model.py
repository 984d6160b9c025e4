"""A real model, twenty prompts: the same tokens from every tier, in any batch and any chunks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kvstore
from kvstore.engine.engine import Engine
from kvstore.engine.loading import LoadedModel, load
from kvstore.engine.output import Output
from kvstore.engine.prompts import Prompt
from kvstore.engine.sampling import SamplingParams
from kvstore.store import BlockStore
from tests.engine.reference import check

SUBJECTS = [
    "the sea",
    "the moon",
    "bread",
    "clocks",
    "a lighthouse keeper who collects maps of places that are not there any more: of a town that "
    "the sea has taken, street by street, until only the church tower was left for the gulls; of "
    "an island that was drawn by a captain who wanted to be promoted, and that was not there when "
    "the next ship came; and of a railway that was paid for twice and never built, whose stations "
    "all have names, opening hours and a printed table of the fares",
    "prime numbers",
    "the history of the bicycle, from its beginnings to the present day",
    "tea",
    "volcanoes",
    "rain in the desert",
]
QUESTIONS = [
    "What is the first thing that a child should be told about {}?",
    "Write one short sentence about {}, and then another one that contradicts it.",
]
PROMPTS: list[Prompt] = [
    [
        {"role": "system", "content": "You answer in plain words, briefly, and never guess."},
        {"role": "user", "content": question.format(subject)},
    ]
    for question in QUESTIONS
    for subject in SUBJECTS
]
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, smollm2_path: Path) -> LoadedModel:
    return load(smollm2_path, DTYPES[request.param])


@pytest.fixture(scope="module")
def cache_off(model: LoadedModel) -> list[tuple[int, ...]]:
    """The answers one at a time, prompts in one piece, and nothing found anywhere."""
    with engine_of(model, None, max_batch=1) as engine:
        outputs = []
        for prompt in PROMPTS:
            outputs += engine.generate([prompt], PARAMS)
            engine.clear_hbm()
    assert all(output.usage.recomputed_tokens == output.usage.prompt_tokens for output in outputs)
    return [output.token_ids for output in outputs]


def engine_of(
    model: LoadedModel, store: BlockStore | None, *, max_batch: int = 8, chunk: int = 512
) -> Engine:
    return Engine(
        model,
        store=store,
        hbm_bytes="160 MiB",
        max_batch=max_batch,
        prefill_chunk_tokens=chunk,
    )


def store_at(folder: Path) -> BlockStore:
    return kvstore.open(ram_bytes="192 MiB", nvme_path=folder, nvme_bytes="256 MiB")


def total(outputs: list[Output], source: str) -> int:
    return sum(getattr(output.usage, f"{source}_tokens") for output in outputs)


def test_every_tier_gives_the_answers_of_none(
    model: LoadedModel, cache_off: list[tuple[int, ...]], tmp_path: Path
) -> None:
    assert len(set(cache_off)) > 10
    with store_at(tmp_path) as store, engine_of(model, store) as engine:
        cold = engine.generate(PROMPTS, PARAMS)
        hbm = engine.generate(PROMPTS, PARAMS)
        engine.clear_hbm()
        ram = engine.generate(PROMPTS, PARAMS)
    with store_at(tmp_path) as store, engine_of(model, store, max_batch=1, chunk=32) as engine:
        nvme = engine.generate(PROMPTS, PARAMS)
    for outputs in (cold, hbm, ram, nvme):
        check(outputs, cache_off)
    assert total(cold, "hbm") > 0  # of the system prompt, which they share
    for outputs, source in ((hbm, "hbm"), (ram, "ram"), (nvme, "nvme")):
        assert total(outputs, source) > 0
        assert total(outputs, "recomputed") <= 16 * len(PROMPTS)


@pytest.fixture
def chunked(model: LoadedModel) -> Iterator[Engine]:
    with engine_of(model, None, chunk=24) as engine:
        yield engine


def test_chunks_and_company_change_nothing(
    chunked: Engine, cache_off: list[tuple[int, ...]]
) -> None:
    check(chunked.generate(PROMPTS, PARAMS), cache_off)

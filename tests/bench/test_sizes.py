"""Bytes of a model's KV and weights, and models whose weights are random."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvstore.bench.random_model import RandomCheckpoint, random_model
from kvstore.bench.sizes import (
    FULL,
    LLAMA_8B,
    TINY,
    TINY_MODEL,
    DecodeShape,
    most_at_once,
    pair_bytes,
    prompt_flops,
    token_bytes,
    weight_count,
)
from kvstore.engine.engine import Engine
from kvstore.engine.model import Decoder
from kvstore.engine.naming import namespace_of
from kvstore.engine.sampling import SamplingParams

CPU = torch.device("cpu")


def test_llama_3_1_8b() -> None:
    assert weight_count(LLAMA_8B) == 8_030_261_248
    assert token_bytes(LLAMA_8B, 2) == 128 << 10
    assert pair_bytes(LLAMA_8B, 1) == 2 << 10
    assert (FULL.model, FULL.dtype) == (LLAMA_8B, "bfloat16")


def test_work_of_a_prompt() -> None:
    """Its tokens meet all weights but the embeddings; pairs of them count on top."""
    matrices = 8_030_261_248 - 2 * 128_256 * 4096 - (2 * 32 + 1) * 4096
    assert prompt_flops(LLAMA_8B, 1) == 2 * matrices + 4 * 4096 * 32
    assert prompt_flops(LLAMA_8B, 3) == 2 * matrices * 3 + 4 * 4096 * 32 * 6


def test_more_sessions_take_turns_than_hbm_holds() -> None:
    for sizes in (FULL, TINY):
        held = sizes.session_hbm_bytes / (sizes.session_tokens * token_bytes(sizes.model, 2))
        assert sizes.sessions > held + most_at_once(sizes) / 2
        assert held > most_at_once(sizes)


def test_a_shape_says_its_context_in_binary_thousands_if_it_is_one() -> None:
    assert DecodeShape(8, 32_768).label == "batch 8, context 32 Ki"
    assert DecodeShape(8, 1000).label == "batch 8, context 1000"


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_are_as_many_as_are_counted(tied: bool) -> None:
    config = dataclasses.replace(TINY_MODEL, tied_embeddings=tied)
    checkpoint = RandomCheckpoint(config, torch.bfloat16, CPU)
    taken: list[int] = []
    original = checkpoint.weight

    def weight(name: str) -> torch.Tensor:
        made = original(name)
        assert made.numel() * 2 == checkpoint.weight_bytes(name)
        taken.append(made.numel())
        return made

    checkpoint.weight = weight  # type: ignore[method-assign]
    Decoder.load(checkpoint, torch.bfloat16, CPU)
    assert sum(taken) == weight_count(config)
    assert checkpoint.weights_bytes == 2 * sum(taken)


def test_a_random_model_generates_what_it_is_asked_for() -> None:
    model = random_model(TINY_MODEL, torch.float32, CPU)
    assert namespace_of(model, torch.float32, block_tokens=16).layout.block_bytes == 65_536
    prompts = [[1, 2, 3], [9] * 40]
    with Engine(model, hbm_bytes="8 MiB") as engine:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    assert [len(output.token_ids) for output in outputs] == [12, 12]
    assert len(set(outputs[0].token_ids)) > 1, "logits are no numbers, or all alike"

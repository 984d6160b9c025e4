"""The loader's model is transformers' model: the same weights, logits and greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.convert import write_hf_folder
from kvstore.engine.batch import Batch, SequenceSpan
from kvstore.engine.engine import Engine
from kvstore.engine.gguf_file import GGUFFile
from kvstore.engine.loading import LoadedModel, load
from kvstore.engine.prompts import prompt_tokens
from kvstore.engine.sampling import SamplingParams
from tests.engine.test_real_model import PROMPTS
from tests.engine.tiny import tiny_model

# Progress bars would take a lock that is shared memory.
logging.disable_progress_bar()

TOKENS = 64
BLOCK_TOKENS = 16


def logits_of(model: LoadedModel, tokens: list[int]) -> torch.Tensor:
    """Our logits [tokens, vocab], the whole sequence in one pass."""
    config = model.config
    blocks = -(-len(tokens) // BLOCK_TOKENS)
    shape = (config.kv_heads, config.layers, 2, blocks * BLOCK_TOKENS, config.head_dim)
    kv = torch.zeros(shape, dtype=model.decoder.dtype)
    batch = Batch.build(
        [SequenceSpan(len(tokens), 0, range(blocks))],
        [tokens],
        block_tokens=BLOCK_TOKENS,
        logits_rows=range(len(tokens)),
    )
    return model.decoder.forward(batch, kv)


def their_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0].float()
    return logits


@pytest.fixture(scope="module")
def folder(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transformers") / "smollm2"
    write_hf_folder(GGUFFile(smollm2_path), path, torch.float32)
    return path


def test_the_same_64_greedy_tokens_on_20_prompts(smollm2_path: Path, folder: Path) -> None:
    """By induction: wherever our answer has come to, its next token is their most likely one."""
    model = load(smollm2_path, torch.float32)
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    with Engine(model, hbm_bytes="192 MiB") as engine:
        outputs = engine.generate(PROMPTS, params)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        asked = prompt_tokens(model, prompt)
        tokens = [*asked, *output.token_ids]
        assert len(output.token_ids) == TOKENS
        expected = their_logits(theirs, tokens)
        assert expected[len(asked) - 1 : -1].argmax(-1).tolist() == list(output.token_ids)
        torch.testing.assert_close(logits_of(model, tokens), expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"model_type": "qwen2"},
        {"model_type": "qwen3"},
        {"model_type": "mistral"},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=lambda variant: "-".join(map(str, variant)) + str(variant.get("model_type", "")),
)
def test_each_architecture_has_their_logits(tmp_path: Path, variant: dict[str, Any]) -> None:
    path = tiny_model(tmp_path / "tiny", **variant)
    tokens = [i * 7 % 256 for i in range(150)]
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = their_logits(theirs, tokens)
    ours = logits_of(load(path, torch.float32), tokens)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_in_bfloat16_no_further_from_float32_than_they_are(
    smollm2_path: Path, folder: Path
) -> None:
    """Two ways of rounding do not agree to the last bit; which of them is nearer can be said."""
    ours = load(smollm2_path, torch.bfloat16)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    our_error = their_error = 0.0
    for prompt in PROMPTS[:5]:
        tokens = prompt_tokens(ours, prompt)
        expected = their_logits(exact, tokens)
        our_error += mean_square(logits_of(ours, tokens) - expected)
        their_error += mean_square(their_logits(theirs, tokens) - expected)
    assert our_error <= 1.05 * their_error


def mean_square(errors: torch.Tensor) -> float:
    return errors.square().mean().item()

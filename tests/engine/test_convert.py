"""A GGUF written as a Hugging Face folder is the same model, to us and to transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.convert import write_hf_folder
from kvstore.engine.gguf_file import GGUFFile
from kvstore.engine.loading import LoadedModel, load
from kvstore.errors import ModelError
from tests.engine.reference import greedy
from tests.engine.tiny import tiny_model
from tests.engine.tiny_gguf import TOKENS, tiny_gguf

MESSAGES = [{"role": "user", "content": "over there"}]


@pytest.mark.parametrize(
    "variant",
    [{}, {"model_type": "qwen2"}, {"model_type": "qwen3"}, {"tie_word_embeddings": False}],
    ids=lambda variant: "-".join(map(str, variant.values())) or "llama",
)
def test_the_folder_is_the_same_model(tmp_path: Path, variant: dict[str, Any]) -> None:
    source = tiny_model(tmp_path / "source", vocab_size=len(TOKENS), **variant)
    file = tiny_gguf(tmp_path / "tiny.gguf", source)
    write_hf_folder(GGUFFile(file), tmp_path / "folder", torch.float32)
    ours, theirs = load(file, torch.float32), load(tmp_path / "folder", torch.float32)
    assert _talk(ours) == _talk(theirs)
    assert ours.config.rope == theirs.config.rope
    peer: Any = AutoTokenizer.from_pretrained(tmp_path / "folder")
    text = peer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == ours.tokenizer.render_chat(MESSAGES)
    assert peer(text, add_special_tokens=False)["input_ids"] == ours.tokenizer.encode(text)
    assert {peer.eos_token_id} == ours.tokenizer.eos_token_ids


def _talk(model: LoadedModel) -> tuple[str, list[int], tuple[int, ...], frozenset[int]]:
    text = model.tokenizer.render_chat(MESSAGES)
    tokens = model.tokenizer.encode(text)
    return text, tokens, greedy(model, tokens, 12), model.tokenizer.eos_token_ids


def test_rope_factors_have_no_place_in_a_folder(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "source", vocab_size=len(TOKENS))
    factors = torch.linspace(1, 8, 8).numpy()
    file = tiny_gguf(tmp_path / "tiny.gguf", source, extra_tensors={"rope_freqs.weight": factors})
    with pytest.raises(ModelError, match="RoPE factors"):
        write_hf_folder(GGUFFile(file), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()

"""GGUF files against the Hugging Face folders with the same weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from kvstore.engine import gguf_file
from kvstore.engine.batch import Batch, SequenceSpan
from kvstore.engine.checkpoint import Checkpoint
from kvstore.engine.gguf_file import GGUFFile
from kvstore.engine.hf_folder import HFFolder
from kvstore.engine.loading import LoadedModel, load
from kvstore.engine.model import Decoder
from kvstore.engine.weights import weight_shapes
from kvstore.errors import ModelError
from tests.engine.reference import greedy
from tests.engine.tiny import tiny_model
from tests.engine.tiny_gguf import TOKENS, rounded, tiny_gguf

KINDS = [GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")]
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama untied": {"tie_word_embeddings": False},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama, linear RoPE": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "qwen2": {"model_type": "qwen2"},
    "qwen3, heads wider than the model": {"model_type": "qwen3", "head_dim": 32},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("gguf") / "tiny", vocab_size=len(TOKENS))


@pytest.fixture(scope="module")
def tiny_file(folder: Path) -> Path:
    return tiny_gguf(folder.parent / "tiny.gguf", folder)


def logits(checkpoint: Checkpoint) -> Tensor:
    decoder, config = (
        Decoder.load(checkpoint, torch.float32, torch.device("cpu")),
        checkpoint.config,
    )
    tokens = [i * 37 % config.vocab_size for i in range(40)]
    kv = torch.zeros(config.kv_heads, config.layers, 2, len(tokens), config.head_dim)
    span = SequenceSpan(len(tokens), 0, range(len(tokens)))
    return decoder.forward(Batch.build([span], [tokens], block_tokens=1), kv)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_weights_and_logits_are_those_of_the_rounded_folder(
    folder: Path, tmp_path: Path, kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "CHUNK_ELEMENTS", 1000)  # several pieces, the last one short
    ours = GGUFFile(tiny_gguf(tmp_path / "tiny.gguf", folder, kind))
    theirs = HFFolder(rounded(folder, tmp_path / "rounded", kind))
    assert dataclasses.replace(ours.config, name="", norm_eps=1e-5) == dataclasses.replace(
        theirs.config, name=""
    )
    for name in weight_shapes(theirs.config):
        assert torch.equal(ours.weight(name).float(), theirs.weight(name)), name
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_each_architecture(tmp_path: Path, variant: dict[str, Any]) -> None:
    folder = tiny_model(tmp_path / "folder", vocab_size=len(TOKENS), **variant)
    metadata = {}
    if "rope_scaling" in variant:
        metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    file = tiny_gguf(tmp_path / "tiny.gguf", folder, metadata=metadata)
    torch.testing.assert_close(
        logits(GGUFFile(file)), logits(HFFolder(folder)), rtol=1e-5, atol=1e-4
    )


def test_llama3_rope_comes_as_a_tensor_of_factors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    folder = tiny_model(tmp_path / "folder", vocab_size=len(TOKENS), rope_scaling=scaling)
    scaled = HFFolder(folder).config.rope
    plain = dataclasses.replace(scaled, scaling="none")
    factors = (plain.frequencies() / scaled.frequencies()).numpy()
    assert factors.min() == 1.0
    assert factors.max() == 8.0
    file = tiny_gguf(tmp_path / "tiny.gguf", folder, extra_tensors={"rope_freqs.weight": factors})
    torch.testing.assert_close(GGUFFile(file).config.rope.frequencies(), scaled.frequencies())


def test_a_loaded_file_talks(tiny_file: Path) -> None:
    model = load(tiny_file, torch.float32)
    prompt = model.tokenizer.render_chat([{"role": "user", "content": "her"}])
    tokens = model.tokenizer.encode(prompt, add_special_tokens=False)
    assert [model.tokenizer.token_text(t) for t in tokens] == [
        "<|user|>", "h", "er", "<|end|>", "<|assistant|>",
    ]  # fmt: skip
    assert model.tokenizer.eos_token_ids == {256}
    assert len(greedy(model, tokens, 8)) == 8


def test_progress_ends_at_all_of_the_bytes(tiny_file: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(tiny_file, torch.float32, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (GGUFFile(tiny_file).weights_bytes,) * 2


def test_fingerprints_tell_files_apart(folder: Path, tiny_file: Path, tmp_path: Path) -> None:
    def changed(name: str, weight: np.ndarray[Any, np.dtype[Any]]) -> Any:
        return weight + 1 if name == "blk.1.ffn_norm.weight" else weight

    same = GGUFFile(tiny_gguf(tmp_path / "same.gguf", folder))
    finer = GGUFFile(tiny_gguf(tmp_path / "finer.gguf", folder, change=changed))
    other_tokens = {"tokenizer.ggml.tokens": [*TOKENS[:-2], "<|robot|>", "er"]}
    words = GGUFFile(tiny_gguf(tmp_path / "words.gguf", folder, metadata=other_tokens))
    ours = GGUFFile(tiny_file)
    assert same.weights_fingerprint() == ours.weights_fingerprint()
    assert finer.weights_fingerprint() != ours.weights_fingerprint()
    assert finer.tokenizer_fingerprint() == ours.tokenizer_fingerprint()
    assert words.tokenizer_fingerprint() != ours.tokenizer_fingerprint()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (
        {"metadata": {"general.architecture": "mamba"}},
        "'mamba' is not supported; these are: llama, qwen2, qwen3",
    ),
    "no architecture of a known type": (
        {"metadata": {"general.architecture": 7}},
        "architecture '7' is not supported",
    ),
    "a size left out": ({"metadata": {"llama.block_count": None}}, "llama.block_count"),
    "no heads": ({"metadata": {"llama.attention.head_count": 0}}, "cannot be used"),
    "heads for each layer": (
        {"metadata": {"llama.attention.head_count": [4, 2]}},
        "cannot be used",
    ),
    "experts": ({"metadata": {"llama.expert_count": 8}}, "experts"),
    "one part of several": ({"metadata": {"split.count": 3}}, "merge the parts"),
    "more layers than tensors": ({"metadata": {"llama.block_count": 1 << 30}}, "fewer tensors"),
    "other scaling": ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "'yarn'"),
    "a tensor left out": (
        {"change": lambda name, w: None if name == "blk.1.ffn_up.weight" else w},
        "no tensor blk.1.ffn_up.weight",
    ),
    "a tensor too narrow": (
        {"change": lambda name, w: w[:, :32] if name == "blk.0.attn_q.weight" else w},
        r"blk.0.attn_q.weight of shape \(64, 32\), not \(64, 64\)",
    ),
    "a tensor too many": (
        {"extra_tensors": {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}},
        "blk.0.attn_sinks.weight, which is not supported",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refused_in_one_line(
    folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    file = tiny_gguf(tmp_path / "bad.gguf", folder, **options)
    with pytest.raises(ModelError, match=message) as error:
        GGUFFile(file)
    assert "\n" not in str(error.value)


def test_a_type_that_nothing_dequantises_is_refused_at_once(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "folder", vocab_size=len(TOKENS))
    file = tiny_gguf(tmp_path / "bad.gguf", folder)
    data = bytearray(file.read_bytes())
    name = b"blk.0.ffn_up.weight"
    # The name, the number of dimensions (4 bytes), two sizes (8 each), the type.
    at = data.index(name) + len(name) + 4 + 2 * 8
    assert data[at] == GGMLQuantizationType.F32
    data[at] = GGMLQuantizationType.I32
    file.write_bytes(data)
    with pytest.raises(ModelError, match="quantised as I32, which is not supported"):
        GGUFFile(file)
    data[at] = 99
    file.write_bytes(data)
    with pytest.raises(ModelError, match=r"blk.0.ffn_up.weight in unknown quantisation 99"):
        GGUFFile(file)


def test_a_weight_that_the_model_has_not(tiny_file: Path) -> None:
    with pytest.raises(ModelError, match=r"has no weight lm_head.weight"):
        GGUFFile(tiny_file).weight("lm_head.weight")


def test_a_file_that_shrinks_after_it_was_opened(folder: Path, tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "tiny.gguf", folder)
    opened = GGUFFile(file)
    file.write_bytes(file.read_bytes()[:-4])
    names = list(weight_shapes(opened.config))
    with pytest.raises(ModelError, match="cut short"):
        [opened.weight(name) for name in names]
    file.unlink()
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        opened.weight(names[0])
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        opened.weights_fingerprint()


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> LoadedModel:
    """The real model: 30 layers in Q4_1, the embedding in Q8_0."""
    return load(smollm2_path, torch.float32)


def test_smollm2_answers_a_question(smollm2: LoadedModel) -> None:
    prompt = smollm2.tokenizer.render_chat(
        [{"role": "user", "content": "What is the capital of France?"}]
    )
    tokens = smollm2.tokenizer.encode(prompt, add_special_tokens=False)
    answer = greedy(smollm2, tokens, 8)
    assert answer[-1] in smollm2.tokenizer.eos_token_ids
    assert smollm2.tokenizer.decode(answer) == "The capital of France is Paris."


def test_smollm2_splits_text_as_it_was_trained_to(smollm2: LoadedModel) -> None:
    t = smollm2.tokenizer
    tokens = [t.token_text(i) for i in t.encode("It's  2026,\n\n an été<|im_end|>")]
    assert tokens == [
        "It", "'s", "ĠĠ", "2", "0", "2", "6", ",", "ĊĊ", "Ġan", "Ġ", "Ã©t", "Ã©", "<|im_end|>",
    ]  # fmt: skip
    text = "def f(x):\n\treturn x  # 日本語 🙂 1234\r\n\x00"
    assert t.decode(t.encode(text)) == text

"""The tiny model of a Hugging Face folder as a GGUF file, written by the `gguf` package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import MODEL_ARCH, GGMLQuantizationType
from safetensors.torch import load_file, save_file

from tests.engine.tiny import CHAT_TEMPLATE, SPECIAL, byte_tokens

# One merge, because a list in a GGUF is never empty.
TOKENS = [*byte_tokens(), *SPECIAL, "er"]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * 256 + [3] * len(SPECIAL) + [1],
    "tokenizer.ggml.merges": ["e r"],
    "tokenizer.ggml.eos_token_id": 256,
    "tokenizer.chat_template": CHAT_TEMPLATE,
}
Array = np.ndarray[Any, np.dtype[Any]]


def tiny_gguf(
    path: Path,
    folder: Path,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] | None = None,
    extra_tensors: Mapping[str, Array] | None = None,
    change: Callable[[str, Array], Array | None] = lambda name, weight: weight,
) -> Path:
    """Write the model of `folder`, its matrices as `kind`, its vectors in float32.

    `metadata` replaces fields (None leaves one out); `change` replaces weights, by their
    GGUF names (None leaves one out).
    """
    fields = json.loads((folder / "config.json").read_text())
    architecture = fields["model_type"]
    writer = gguf.GGUFWriter(None, architecture)
    for key, value in {**_metadata(fields), **TOKENIZER, **(metadata or {})}.items():
        if value is not None:
            _add_field(writer, key, value)
    names = gguf.get_tensor_name_map(
        {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3}[
            architecture
        ],
        fields["num_hidden_layers"],
    )
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        weight = tensor.numpy()
        if architecture == "llama":
            weight = _paired(name, weight, fields)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None
        weights[theirs] = weight
    for name, weight in {**weights, **(extra_tensors or {})}.items():
        changed = change(name, weight)
        if changed is not None:
            own = kind if changed.ndim > 1 else GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quantize(changed, own), raw_dtype=own)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rounded(folder: Path, target: Path, kind: GGMLQuantizationType) -> Path:
    """The model of `folder` with each matrix as it is after quantising and back."""
    target.mkdir()
    for file in folder.glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if weight.ndim > 1:
            quantised = gguf.quantize(weight.numpy(), kind)
            weights[name] = torch.from_numpy(gguf.dequantize(quantised, kind).copy())
    save_file(weights, target / "model.safetensors")
    return target


def _metadata(fields: Mapping[str, Any]) -> dict[str, Any]:
    prefix = fields["model_type"] + "."
    return {
        prefix + "block_count": fields["num_hidden_layers"],
        prefix + "context_length": fields["max_position_embeddings"],
        prefix + "embedding_length": fields["hidden_size"],
        prefix + "feed_forward_length": fields["intermediate_size"],
        prefix + "attention.head_count": fields["num_attention_heads"],
        prefix + "attention.head_count_kv": fields["num_key_value_heads"],
        prefix + "attention.key_length": fields["head_dim"],
        prefix + "attention.value_length": fields["head_dim"],
        prefix + "attention.layer_norm_rms_epsilon": fields["rms_norm_eps"],
        prefix + "rope.dimension_count": fields["head_dim"],
        prefix + "rope.freq_base": fields["rope_theta"],
    }


def _add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if key == "general.alignment":
        writer.add_custom_alignment(value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _paired(name: str, weight: Array, fields: Mapping[str, Any]) -> Array:
    """Rows i and i + dim/2 of each head side by side, as converters for llama.cpp put them."""
    heads = {
        "q_proj": fields["num_attention_heads"],
        "k_proj": fields["num_key_value_heads"],
    }.get(name.split(".")[-2])
    if heads is None:
        return weight
    per_head = np.split(weight, heads)
    pairs = [np.stack(np.split(head, 2), axis=1).reshape(head.shape) for head in per_head]
    return np.concatenate(pairs)

"""A GGUF file as a Hugging Face folder, for the engines that want one.

    python -m benchmarks.convert MODEL.gguf FOLDER

Weights are written in bfloat16, as vLLM and transformers run them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kvstore.engine.checkpoint import Checkpoint
from kvstore.engine.config import ModelConfig
from kvstore.engine.loading import open_checkpoint
from kvstore.engine.rope import Rope
from kvstore.engine.tokenizer import Tokenizer
from kvstore.engine.weights import weight_shapes
from kvstore.errors import ModelError

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def write_hf_folder(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write config, weights and tokenizer. Raises ModelError where config.json has no words."""
    config, tokenizer = checkpoint.config, checkpoint.tokenizer()
    fields = config_fields(config, dtype)
    eos = sorted(tokenizer.eos_token_ids)
    if eos:
        fields["eos_token_id"] = eos if len(eos) > 1 else eos[0]
    weights = {n: checkpoint.weight(n).to(dtype).contiguous() for n in weight_shapes(config)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    _write_json(folder / "tokenizer_config.json", tokenizer_fields(tokenizer, config))
    _write_json(folder / "config.json", fields)
    _write_json(folder / "generation_config.json", {"eos_token_id": eos} if eos else {})


def config_fields(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json."""
    c = config
    return {
        "architectures": [CLASSES[c.architecture]],
        "model_type": c.architecture,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.context_tokens,
        "rms_norm_eps": c.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": c.tied_embeddings,
        "attention_bias": c.output_bias,
        "mlp_bias": c.mlp_bias,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **_rope_fields(c.rope),
    }


def tokenizer_fields(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context_tokens,
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.chat_template,
        **tokenizer.special,
    }


def _rope_fields(rope: Rope) -> dict[str, Any]:
    if rope.scaling == "factors":
        raise ModelError("RoPE factors of a GGUF cannot be said in a config.json")
    fields: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.scaling == "linear":
        fields["rope_scaling"] = {"rope_type": "linear", "factor": rope.factor}
    if rope.scaling == "llama3":
        fields["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_frequency_factor,
            "high_freq_factor": rope.high_frequency_factor,
            "original_max_position_embeddings": rope.original_context_tokens,
        }
    return fields


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF model as a Hugging Face folder.")
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_hf_folder(open_checkpoint(arguments.model), arguments.folder)


if __name__ == "__main__":
    main()

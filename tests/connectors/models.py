"""Tiny random transformers models, as a user would have loaded them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def tiny(
    kind: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """The same seed, the same weights; large ones, so that answers are no close calls."""
    configuration, model = KINDS[kind]
    if kind == "mistral":
        changes.setdefault("sliding_window", None)
    torch.manual_seed(seed)
    made = model(configuration(**{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 2.0 / parameter.shape[1] ** 0.5)
    return made.to(dtype).eval()

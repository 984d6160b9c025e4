"""Tiny random transformers models, as a user would have loaded them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
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


def tiny_mla() -> Any:
    """A model whose cache holds a latent vector, and not K and V of heads."""
    config = DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4, "head_dim": 8},
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=1,
    )
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config).eval()

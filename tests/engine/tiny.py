"""A tiny random Llama-family model as a Hugging Face folder, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvstore.engine.config import ModelConfig, config_from_hf

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def tiny_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write config.json, model.safetensors and tokenizer files; the same seed, the same bytes.

    `changes` replace fields of config.json (`model_type="qwen2"`, `num_hidden_layers=3`, ...).
    The vocabulary is every byte and four special tokens; `<|end|>` (256) is the EOS.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = {**_config(), **changes}
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(_weights(config_from_hf(fields, "tiny"), seed), folder / "model.safetensors")
    _tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHAT_TEMPLATE, "eos_token": SPECIAL[0]})
    )
    return folder


def _config() -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 256 + len(SPECIAL),
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 256,
    }


def _weights(config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return random(rows, columns, scale=2.0 / columns**0.5)

    def gain(size: int) -> torch.Tensor:
        return 1.0 + random(size, scale=0.1)

    c = config
    weights = {
        "model.embed_tokens.weight": random(c.vocab_size, c.hidden_size, scale=1.0),
        "model.norm.weight": gain(c.hidden_size),
    }
    if not c.tied_embeddings:
        weights["lm_head.weight"] = matrix(c.vocab_size, c.hidden_size)
    shapes = {
        "self_attn.q_proj": (c.query_size, c.hidden_size, c.qkv_bias),
        "self_attn.k_proj": (c.kv_size, c.hidden_size, c.qkv_bias),
        "self_attn.v_proj": (c.kv_size, c.hidden_size, c.qkv_bias),
        "self_attn.o_proj": (c.hidden_size, c.query_size, c.output_bias),
        "mlp.gate_proj": (c.intermediate_size, c.hidden_size, c.mlp_bias),
        "mlp.up_proj": (c.intermediate_size, c.hidden_size, c.mlp_bias),
        "mlp.down_proj": (c.hidden_size, c.intermediate_size, c.mlp_bias),
    }
    for layer in range(c.layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns, bias) in shapes.items():
            weights[f"{prefix}{name}.weight"] = matrix(rows, columns)
            if bias:
                weights[f"{prefix}{name}.bias"] = random(rows, scale=0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = gain(c.hidden_size)
        if c.qk_norm:
            weights[prefix + "self_attn.q_norm.weight"] = gain(c.head_dim)
            weights[prefix + "self_attn.k_norm.weight"] = gain(c.head_dim)
    return weights


def byte_tokens() -> list[str]:
    """The tokens of all 256 bytes, in the order of their ids."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _tokenizer() -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(byte_tokens())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer

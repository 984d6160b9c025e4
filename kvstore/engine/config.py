"""What a model is: its sizes and variants, read from a config.json or from GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.engine.rope import Rope, rope_from_gguf, rope_from_hf
from kvstore.errors import ModelError

# Hugging Face `model_type`. SmolLM2 says "llama"; in a GGUF so does Mistral.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of a Llama-family decoder and the few points in which the family differs."""

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_tokens: int
    norm_eps: float
    rope: Rope
    tied_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        sizes = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "layers": self.layers,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "context_tokens": self.context_tokens,
        }
        for field, size in sizes.items():
            if size < 1:
                raise ModelError(f"model config: {field} is {size}, it must be at least 1")
        if self.heads % self.kv_heads:
            raise ModelError(
                f"model config: {self.heads} heads are not a multiple of {self.kv_heads} KV heads"
            )
        if not (0 < self.norm_eps < math.inf and 0 < self.rope.theta < math.inf):
            raise ModelError(
                f"model config: norm eps {self.norm_eps} and RoPE theta {self.rope.theta} "
                "must be above 0 and finite"
            )
        if self.head_dim % 2:
            raise ModelError(f"model config: head size {self.head_dim} is odd, RoPE needs pairs")

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of K, and of V, of one token in one layer."""
        return self.kv_heads * self.head_dim


def config_from_hf(fields: Mapping[str, Any], name: str) -> ModelConfig:
    """Read a parsed `config.json`. Raises ModelError on what this decoder does not do."""
    architecture = fields.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ModelError(_unknown(str(architecture), ARCHITECTURES))
    if fields.get("quantization_config"):
        raise ModelError("quantised safetensors are not supported; use the bf16 folder or a GGUF")
    if fields.get("hidden_act", "silu") != "silu":
        raise ModelError(f"activation {fields['hidden_act']!r} is not supported, only silu")
    try:
        heads, hidden = int(fields["num_attention_heads"]), int(fields["hidden_size"])
        head_dim = int(fields.get("head_dim") or hidden // heads)
        context = int(fields["max_position_embeddings"])
        _refuse_sliding_window(fields, context)
        # Qwen2 always has biases on q, k, v and never on o; the others say it in the file.
        bias = bool(fields.get("attention_bias", False))
        return ModelConfig(
            name=name,
            architecture=architecture,
            vocab_size=int(fields["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(fields["intermediate_size"]),
            layers=int(fields["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(fields.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            context_tokens=context,
            norm_eps=float(fields["rms_norm_eps"]),
            rope=rope_from_hf(fields, head_dim),
            tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
            qkv_bias=architecture == "qwen2" or bias,
            output_bias=architecture != "qwen2" and bias,
            mlp_bias=bool(fields.get("mlp_bias", False)),
            qk_norm=architecture == "qwen3",
        )
    except KeyError as error:
        raise ModelError(f"config.json has no field {error}, which this model needs") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ModelError(f"config.json cannot be used: {error!r}") from error


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    rope_factors: Sequence[float] | None = None,
) -> ModelConfig:
    """Read GGUF metadata; `tensors` maps tensor names to shapes (rows first).

    `rope_factors` is the content of the tensor rope_freqs, by which Llama 3 files
    say how RoPE is scaled.
    """
    architecture = str(metadata.get("general.architecture"))
    if architecture not in GGUF_ARCHITECTURES:
        raise ModelError(_unknown(architecture, GGUF_ARCHITECTURES))

    def field(name: str) -> Any:
        return metadata[f"{architecture}.{name}"]

    try:
        heads, hidden = int(field("attention.head_count")), int(field("embedding_length"))
        key_length = metadata.get(f"{architecture}.attention.key_length", hidden // heads)
        if metadata.get(f"{architecture}.attention.value_length", key_length) != key_length:
            raise ModelError("heads whose K and V differ in size are not supported")
        if metadata.get(f"{architecture}.expert_count"):
            raise ModelError("mixtures of experts are not supported")
        context = int(field("context_length"))
        window = metadata.get(f"{architecture}.attention.sliding_window")
        if window and window < context:
            raise ModelError(_window(window, context))
        rope = rope_from_gguf(metadata, architecture, int(key_length))
        if rope_factors is not None:
            rope = rope.with_factors(rope_factors)
        return ModelConfig(
            name=str(metadata.get("general.name", "gguf")),
            architecture=architecture,
            vocab_size=tensors["token_embd.weight"][0],
            hidden_size=hidden,
            intermediate_size=int(field("feed_forward_length")),
            layers=int(field("block_count")),
            heads=heads,
            kv_heads=int(metadata.get(f"{architecture}.attention.head_count_kv", heads)),
            head_dim=int(key_length),
            context_tokens=context,
            norm_eps=float(field("attention.layer_norm_rms_epsilon")),
            rope=rope,
            tied_embeddings="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            output_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_down.bias" in tensors,
            qk_norm="blk.0.attn_q_norm.weight" in tensors,
        )
    except KeyError as error:
        raise ModelError(f"the GGUF file has no {error}, which this model needs") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelError(f"GGUF metadata cannot be used: {error!r}") from error


def _refuse_sliding_window(fields: Mapping[str, Any], context: int) -> None:
    """Windows as long as the context change nothing; a shorter one would."""
    window = fields.get("sliding_window")
    # Qwen files name a window that is off unless `use_sliding_window` says otherwise.
    if not fields.get("use_sliding_window", fields["model_type"] == "mistral"):
        return
    if window and window < context:
        raise ModelError(_window(window, context))


def _unknown(architecture: str, known: tuple[str, ...]) -> str:
    return f"architecture {architecture!r} is not supported; these are: {', '.join(known)}"


def _window(window: int, context: int) -> str:
    return f"sliding-window attention is not supported (window {window} < context {context} tokens)"

"""What a model's blocks are called: its namespace, and the chain of a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from kvstore.engine.calibration import Quantised, quantised
from kvstore.engine.loading import ModelCard, describe, load
from kvstore.engine.prompts import Prompt, prompt_tokens
from kvstore.errors import SettingsError
from kvstore.hashing import Chain, TokenChain
from kvstore.identity import Namespace, salt_digest
from kvstore.tiers.hbm import TORCH_DTYPE

COMPUTED = ("float32", "bfloat16", "float16")


def namespace_of(
    model: ModelCard,
    dtype: torch.dtype,
    *,
    block_tokens: int,
    salt: str = "",
    kept: Quantised | None = None,
) -> Namespace:
    """What the blocks of this model are stored under.

    `dtype` is that in which its KV is computed, and kept, unless `kept` says otherwise.
    """
    config = model.config
    return Namespace(
        model=config.name,
        weights=model.weights_fingerprint,
        tokenizer=model.tokenizer_fingerprint,
        kv_dtype=str(dtype).removeprefix("torch.") if kept is None else kept.dtype,
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        block_tokens=block_tokens,
        rope=config.rope.canonical(),
        kv_quantisation="none" if kept is None else kept.identity(dtype),
        salt=salt_digest(salt),
    )


def model_namespace(
    path: str | Path, *, dtype: str = "auto", block_tokens: int = 16, salt: str = ""
) -> Namespace:
    """What an engine would store the blocks of the model at `path` under: for others to share them.

    A Hugging Face folder or a GGUF file. Loads no weights; blocks for a second. Raises
    ModelError.
    """
    return namespace_of(describe(path), torch_dtype(dtype), block_tokens=block_tokens, salt=salt)


class NamedPrompt(NamedTuple):
    """A prompt's tokens, and the keys under which an engine stores their full blocks."""

    model: ModelCard
    tokens: list[int]
    chain: Chain


def name_prompt(
    path: Path,
    prompt: Prompt,
    *,
    dtype: str,
    block_tokens: int,
    salt: str = "",
    kv_dtype: str = "auto",
) -> NamedPrompt:
    """As an engine of these settings would store it. Blocks for a second.

    Weights are loaded only where KV is quantised, since its scales come from them. Raises
    ModelError, and RequestError for what is no prompt.
    """
    computed, kept = torch_dtype(dtype), None
    if kv_dtype == "auto":
        model = describe(path)
    else:
        loaded = load(path, computed)
        model, kept = loaded, quantised(loaded, kv_dtype)
    namespace = namespace_of(model, computed, block_tokens=block_tokens, salt=salt, kept=kept)
    tokens = prompt_tokens(model, prompt)
    return NamedPrompt(model, tokens, TokenChain(namespace, tokens).chain())


def torch_dtype(name: str) -> torch.dtype:
    """Raises SettingsError for a name that is none."""
    if name == "auto":
        return torch.bfloat16
    if name not in COMPUTED:
        raise SettingsError(f"dtype {name!r} is not one of auto, {', '.join(COMPUTED)}")
    return TORCH_DTYPE[name]

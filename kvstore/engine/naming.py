"""What a model's blocks are called: its namespace, and the chain of a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from kvstore.engine.loading import ModelCard, describe
from kvstore.engine.prompts import Prompt, prompt_tokens
from kvstore.errors import SettingsError
from kvstore.hashing import Chain, TokenChain
from kvstore.identity import Namespace, salt_digest
from kvstore.tiers.hbm import TORCH_DTYPE


def namespace_of(
    model: ModelCard, dtype: torch.dtype, *, block_tokens: int, salt: str = ""
) -> Namespace:
    """What the blocks of this model are stored under. `dtype` is that of its KV."""
    config = model.config
    return Namespace(
        model=config.name,
        weights=model.weights_fingerprint,
        tokenizer=model.tokenizer_fingerprint,
        kv_dtype=str(dtype).removeprefix("torch."),
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        block_tokens=block_tokens,
        rope=config.rope.canonical(),
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
    path: Path, prompt: Prompt, *, dtype: str, block_tokens: int, salt: str = ""
) -> NamedPrompt:
    """As an engine of these settings would store it. Loads no weights; blocks for a second.

    Raises ModelError, and RequestError for what is no prompt.
    """
    kv_dtype = torch_dtype(dtype)
    model = describe(path)
    namespace = namespace_of(model, kv_dtype, block_tokens=block_tokens, salt=salt)
    tokens = prompt_tokens(model, prompt)
    return NamedPrompt(model, tokens, TokenChain(namespace, tokens).chain())


def torch_dtype(name: str) -> torch.dtype:
    """Raises SettingsError for a name that is none."""
    if name == "auto":
        return torch.bfloat16
    if name not in TORCH_DTYPE:
        raise SettingsError(f"dtype {name!r} is not one of auto, {', '.join(TORCH_DTYPE)}")
    return TORCH_DTYPE[name]

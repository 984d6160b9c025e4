"""What a model's blocks are called: its namespace, and the chain of a prompt."""

from __future__ import annotations

from pathlib import Path

import torch

from kvstore.engine.loading import ModelCard, describe
from kvstore.engine.prompts import Prompt, prompt_tokens
from kvstore.errors import SettingsError
from kvstore.hashing import TokenChain
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


def prompt_chain(
    path: Path, prompt: Prompt, *, dtype: str, block_tokens: int, salt: str = ""
) -> TokenChain:
    """The keys under which an engine of these settings stores a prompt. Loads no weights.

    Raises ModelError, and RequestError for what is no prompt.
    """
    model = describe(path)
    kv_dtype = torch_dtype(dtype)
    namespace = namespace_of(model, kv_dtype, block_tokens=block_tokens, salt=salt)
    return TokenChain(namespace, prompt_tokens(model, prompt))


def torch_dtype(name: str) -> torch.dtype:
    """Raises SettingsError for a name that is none."""
    if name == "auto":
        return torch.bfloat16
    if name not in TORCH_DTYPE:
        raise SettingsError(f"dtype {name!r} is not one of auto, {', '.join(TORCH_DTYPE)}")
    return TORCH_DTYPE[name]

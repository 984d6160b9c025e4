"""What vLLM's KV is stored under: the namespace of its model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvstore.connectors.options import Options
from kvstore.engine.hf_folder import HFFolder
from kvstore.errors import LayoutError, ModelError, SettingsError
from kvstore.identity import Namespace, salt_digest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

# Of these the weights are the ones in the model's safetensors; "dummy" ones for example are not.
_LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors")
_KV_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def model_namespace(config: VllmConfig, kv_cache: KVCacheConfig, options: Options) -> Namespace:
    """That of kvstore's own engine for the same folder and dtype: what one stores, both find.

    Blocks for a second, to read samples of the weights. Raises ModelError, one line, for a model
    whose KV is not known to be one K and one V for every token, layer and KV head, SettingsError
    for settings that contradict themselves.
    """
    model, parallel = config.model_config, config.parallel_config
    spec = _full_attention(kv_cache)
    if parallel.pipeline_parallel_size > 1:
        raise ModelError("pipeline-parallel workers hold only some of the layers")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ModelError(f"{name} is above 1: workers hold only some of the tokens")
    if config.cache_config.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        raise ModelError(f"the KV cache is {config.cache_config.cache_dtype}, not {model.dtype}")
    namespace = _given(config, options) or _of_folder(config, options)
    heads = max(1, namespace.kv_heads // parallel.tensor_parallel_size)
    ours = (_KV_DTYPES.get(spec.dtype), len(_layers(kv_cache)), heads, spec.head_size)
    theirs = (namespace.kv_dtype, namespace.layers, spec.num_kv_heads, namespace.head_dim)
    if ours != theirs:
        raise ModelError(f"vLLM's KV (dtype, layers, heads, head size) is {ours}, not {theirs}")
    return namespace


def _given(config: VllmConfig, options: Options) -> Namespace | None:
    """The one that the settings name, if they do, with their salt."""
    namespace = options.namespace
    if namespace is None:
        return None
    asked = config.kv_transfer_config.kv_connector_extra_config.get("block_tokens")
    if asked not in (None, namespace.block_tokens):
        raise SettingsError(
            f"block_tokens is {asked}, but the namespace given is of blocks of "
            f"{namespace.block_tokens} tokens"
        )
    return replace(namespace, salt=salt_digest(options.salt)) if options.salt else namespace


def _of_folder(config: VllmConfig, options: Options) -> Namespace:
    model, load = config.model_config, config.load_config
    if load.load_format not in _LOAD_FORMATS:
        raise ModelError(f"weights of load format {load.load_format!r} cannot be told apart")
    checkpoint = HFFolder(_folder(model, load.download_dir))
    parts = checkpoint.config
    try:
        return Namespace(
            model=parts.name + _changes(model),
            weights=checkpoint.weights_fingerprint(),
            tokenizer=checkpoint.tokenizer_fingerprint(),
            kv_dtype=_KV_DTYPES.get(model.dtype, str(model.dtype)),
            layers=parts.layers,
            kv_heads=parts.kv_heads,
            head_dim=parts.head_dim,
            block_tokens=options.block_tokens,
            rope=parts.rope.canonical(),
            salt=salt_digest(options.salt),
        )
    except LayoutError as error:
        raise ModelError(str(error)) from error


def _folder(model: Any, downloads: str | None) -> Path:
    """Where the model's files are: `model` is a folder, or a name that is in the hub's cache.

    `downloads` is where that is, if vLLM was told.
    """
    if Path(model.model).is_dir():
        return Path(model.model)
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            model.model, revision=model.revision, cache_dir=downloads, local_files_only=True
        )
        return Path(found)
    except Exception as error:
        raise ModelError(f"the files of {model.model} are not here: {error}") from error


def _changes(model: Any) -> str:
    """What vLLM was told to do otherwise than the folder's config says, on which KV depends."""
    if model.hf_config_path not in (None, model.model):
        raise ModelError(f"its config is not the model's own but that of {model.hf_config_path}")
    changes = {
        "quantization": model.quantization,
        "quantization_config": model.quantization_config or None,
        "overrides": model.hf_overrides or None,
    }
    said = {name: value for name, value in changes.items() if value is not None}
    if any(callable(value) for value in said.values()):
        raise ModelError("hf_overrides is a function, of which nobody knows what it does")
    return " " + json.dumps(said, sort_keys=True, default=repr) if said else ""


def _full_attention(kv_cache: KVCacheConfig) -> Any:
    """The spec that all layers share. Exactly full attention: what derives from it is not it."""
    groups = kv_cache.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if kinds != ["FullAttentionSpec"]:
        raise ModelError(f"its KV cache groups are {', '.join(kinds) or 'none'}")
    spec = groups[0].kv_cache_spec
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(spec, name, None) is not None:
            raise ModelError(f"its attention has a {name}")
    if getattr(spec, "non_causal", False):
        raise ModelError("its attention is not causal")
    return spec


def _layers(kv_cache: KVCacheConfig) -> list[str]:
    return list(kv_cache.kv_cache_groups[0].layer_names)

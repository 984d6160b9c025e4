"""Which transformers models have KV that the store can hold, and the namespace of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvstore.connectors.fingerprint import weights_fingerprint
from kvstore.errors import LayoutError, ModelError, RequestError
from kvstore.identity import Namespace, salt_digest

# Decoders whose KV is one K and one V of the same size for every token, layer and KV head.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# RoPE whose rotation of a token depends on its position alone, and not on how long the prompt is.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
KV_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
# How attention is computed: all of these are the same function, but for rounding.
ATTENTION = (
    *("eager", "sdpa", "flex_attention"),
    *("flash_attention_2", "flash_attention_3", "flash_attention_4"),
)
# Fields of a config on which KV does not depend.
NO_MATTER = ("_name_or_path", "transformers_version", "use_cache", "_attn_implementation")

# Arguments of `generate` that choose or end tokens, and leave the cache alone.
KNOWN_ARGUMENTS = {
    *("attention_mask", "bad_words_ids", "begin_suppress_tokens", "bos_token_id"),
    *("do_sample", "eos_token_id", "epsilon_cutoff", "eta_cutoff"),
    *("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id"),
    *("generation_config", "logits_processor", "max_length", "max_new_tokens", "max_time"),
    *("min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size", "num_beams"),
    *("num_return_sequences", "output_logits", "output_scores", "pad_token_id"),
    *("remove_invalid_values", "renormalize_logits", "repetition_penalty"),
    *("return_dict_in_generate", "sequence_bias", "stop_strings", "stopping_criteria"),
    *("streamer", "suppress_tokens", "temperature", "tokenizer", "top_k", "top_p"),
    *("typical_p", "use_cache"),
}
# What a generation config may say of the cache and of who writes to it; None is always right.
PLAIN: Mapping[str, tuple[Any, ...]] = {
    "assistant_early_exit": (),
    "cache_implementation": (),
    "dola_layers": (),
    "guidance_scale": (1, 1.0),
    "low_memory": (False,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0, 0.0),
    "prefill_chunk_size": (),
    "prompt_lookup_num_tokens": (),
    "token_healing": (False,),
    "use_cache": (True,),
}


def namespace_of(model: Any, *, block_tokens: int, salt: str = "") -> Namespace:
    """What the KV of `model`, as it is now, is stored under. Milliseconds.

    `model` is a transformers model of one of `MODEL_TYPES`, in evaluation mode. Config, RoPE and
    weights are part of the namespace by their content, so that another model, other weights and
    merged adapters are told apart. Raises ModelError, one line, for any model whose KV is not
    known to be what the store holds.
    """
    config = model.config
    _check_kind(model)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        raise ModelError(f"RoPE of type {rope.get('rope_type')!r} is not one of {ROPE_TYPES}")
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ModelError("RoPE over a part of the head is not supported")
    layers = DynamicCache(config=config).layers
    for layer in layers:
        if type(layer) is not DynamicLayer:
            raise ModelError(f"a cache layer is a {type(layer).__name__}, not plain full attention")
    tensors = [*model.named_parameters(), *model.named_buffers()]
    dtypes = {tensor.dtype for _, tensor in model.named_parameters()}
    devices = {tensor.device for _, tensor in tensors}
    if len(dtypes) != 1 or not dtypes <= KV_DTYPES.keys():
        raise ModelError(f"weights of {dtypes}; all must be float32, all bfloat16 or all float16")
    if len(devices) != 1 or devices == {torch.device("meta")}:
        raise ModelError(f"weights on {devices}; all must be on one device")
    fields = {k: v for k, v in config.to_dict().items() if k not in NO_MATTER}
    heads = config.num_attention_heads
    try:
        return Namespace(
            model=type(model).__name__,
            weights=weights_fingerprint(_canonical(fields), tensors),
            tokenizer="",  # token ids are all that this engine sees
            kv_dtype=KV_DTYPES[dtypes.pop()],
            layers=len(layers),
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            block_tokens=block_tokens,
            rope=_canonical(rope),
            salt=salt_digest(salt),
        )
    except LayoutError as error:
        raise ModelError(str(error)) from error


def check_arguments(model: Any, arguments: Mapping[str, Any]) -> None:
    """Raises RequestError where `generate` would not fill one plain cache, token by token."""
    unknown = sorted(arguments.keys() - KNOWN_ARGUMENTS)
    if unknown:
        raise RequestError(f"generate is given {', '.join(unknown)}")
    given = arguments.get("generation_config")
    for name, accepted in PLAIN.items():
        value = arguments.get(name)
        for config in (given, model.generation_config):
            value = getattr(config, name, None) if value is None else value
        if value is not None and value not in accepted:
            raise RequestError(f"{name} is {value!r}")


def _check_kind(model: Any) -> None:
    """Refuse wrappers, adapters and layers of other makers: what they compute is not known."""
    kind = getattr(model.config, "model_type", None)
    if kind not in MODEL_TYPES:
        raise ModelError(f"model type {kind!r} is none of {', '.join(MODEL_TYPES)}")
    own = f"transformers.models.{kind}."
    for name, module in model.named_modules():
        source = type(module).__module__
        if not source.startswith((own, "torch.nn.modules.", "transformers.activations")):
            raise ModelError(f"{name or 'the model'} is a {source}.{type(module).__name__}")
        if _is_changed(module):
            raise ModelError(f"{name or 'the model'} has a hook, or another forward")
    if model.training:
        raise ModelError("the model is in training mode: call model.eval()")
    attention = model.config._attn_implementation
    if attention not in ATTENTION:
        raise ModelError(f"attention is {attention!r}, none of {', '.join(ATTENTION)}")
    if torch.is_autocast_enabled(model.device.type):
        raise ModelError("under autocast, KV is not of the model's dtype")


def _is_changed(module: Any) -> bool:
    """Whether something was put around this module's `forward` from outside.

    What transformers itself hooks on only looks, and compiled code computes the same.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if not all(getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks):
        return True
    forward = vars(module).get("forward")
    compiled = getattr(forward, "_torchdynamo_orig_callable", forward)
    return forward is not None and getattr(compiled, "__func__", None) is not type(module).forward


def _canonical(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), default=str)

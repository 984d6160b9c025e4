"""What the connector does not know: vLLM answers as without it, nothing is stored, nothing hits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
)
from transformers.utils import logging

import kvstore
from kvstore.store import BlockStore
from tests.connectors.models import SIZES, tiny
from tests.daemon.doors import Daemon
from tests.engines.conftest import Vllm

pytestmark = pytest.mark.engines

# Progress bars would take a lock that is shared memory.
logging.disable_progress_bar()

PROMPTS = [list(range(3, 203)), list(range(60, 120))]
NEW = 4
# vLLM's kernels for CPUs want heads of 32 or more.
WIDE = {**SIZES, "hidden_size": 128, "head_dim": 32}


def sliding() -> Any:
    return tiny("mistral", sliding_window=64, hidden_size=128, head_dim=32)


def hybrid() -> Any:
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**WIDE, sliding_window=64, layer_types=kinds))


def mla() -> Any:
    """DeepSeek's latent attention."""
    torch.manual_seed(0)
    config = DeepseekV2Config(
        **{**SIZES, "num_key_value_heads": 4, "head_dim": 64},
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        first_k_dense_replace=1,
    )
    return DeepseekV2ForCausalLM(config)


def full() -> Any:
    return tiny("llama", hidden_size=128, head_dim=32)


OTHER = kvstore.Namespace("other", "w", "t", "float32", 2, 3, 64, 16, "")


@pytest.mark.parametrize(
    ("make", "arguments", "extra", "reason"),
    [
        pytest.param(sliding, {}, {}, "SlidingWindow", id="sliding window"),
        pytest.param(hybrid, {}, {}, "its KV cache groups are", id="hybrid"),
        pytest.param(mla, {}, {}, "MLA", id="MLA"),
        pytest.param(full, {"kv_cache_dtype": "fp8"}, {}, "the KV cache is fp8", id="FP8"),
        pytest.param(full, {"load_format": "dummy"}, {}, "load format 'dummy'", id="dummy"),
        pytest.param(full, {}, {"namespace": OTHER.to_json()}, "vLLM's KV", id="another model's"),
    ],
)
def test_what_is_not_known_is_said_once_and_left_alone(
    make: Any,
    arguments: dict[str, Any],
    extra: dict[str, Any],
    reason: str,
    vllm: Vllm,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    make().save_pretrained(folder)
    arguments = {"folder": folder, "max_model_len": 512, **arguments}
    with (
        kvstore.open(ram_bytes="16 MiB") as store,
        Daemon(store, tmp_path / "kvstore.sock") as daemon,
        vllm({"url": daemon.url, **extra}, **arguments) as engine,
    ):
        first = engine.ask("generate", prompts=PROMPTS, tokens=NEW)
        assert engine.ask("reset")
        assert engine.ask("generate", prompts=PROMPTS, tokens=NEW) == first
        assert engine.ask("metrics").get("vllm:external_prefix_cache_hits", 0) == 0
        (line,) = engine.ask("said")
        assert line.startswith("kvstore: running without it: ")
        assert reason in line
        _untouched(store)


def _untouched(store: BlockStore) -> None:
    assert store.stats().ram["blocks"] == 0
    assert store.stats().counters.get("reserved_blocks", 0) == 0

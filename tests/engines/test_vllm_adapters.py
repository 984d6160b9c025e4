"""vLLM with LoRA adapters: an adapter's blocks are its own, by its content and not its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.utils import logging

import kvstore
from tests.connectors.models import tiny
from tests.daemon.doors import Daemon
from tests.engines.conftest import Vllm

pytestmark = pytest.mark.engines

# Progress bars would take a lock that is shared memory.
logging.disable_progress_bar()

HIDDEN, HEAD_DIM, LAYERS, RANK = 128, 32, 2, 8
PROMPTS = [list(range(3, 203)), list(range(60, 120))]
NEW = 8
HITS = "vllm:external_prefix_cache_hits"


def adapter(folder: Path, seed: int) -> str:
    """Of K and V, so large that it changes answers."""
    folder.mkdir()
    made = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    made |= {"target_modules": ["k_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(made))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for name in ("k_proj", "v_proj"):
            start = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{start}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=generator)
            out = 2 * HEAD_DIM
            weights[f"{start}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) / 9
    save_file(weights, str(folder / "adapter_model.safetensors"))
    return str(folder)


def test_adapters_find_their_own_blocks(vllm: Vllm, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny("llama", hidden_size=HIDDEN, head_dim=HEAD_DIM).save_pretrained(folder)
    one, other = adapter(tmp_path / "one", 1), adapter(tmp_path / "other", 2)
    renamed = str(shutil.copytree(one, tmp_path / "renamed"))
    arguments = {"folder": folder, "max_model_len": 512, "enable_lora": True, "max_lora_rank": RANK}
    with (
        kvstore.open(ram_bytes="32 MiB") as store,
        Daemon(store, tmp_path / "kvstore.sock") as daemon,
    ):
        with vllm({"url": daemon.url}, **arguments) as engine:
            cold = {
                each: engine.ask("generate", prompts=PROMPTS, tokens=NEW, adapter=each)
                for each in (None, one, other)
            }
            assert engine.ask("metrics").get(HITS, 0) == 0
        assert len({json.dumps(answers) for answers in cold.values()}) == 3
        with vllm({"url": daemon.url}, **arguments) as engine:
            hits = 0.0
            for asked, answers in [(other, cold[other]), (renamed, cold[one]), (None, cold[None])]:
                assert engine.ask("generate", prompts=PROMPTS, tokens=NEW, adapter=asked) == answers
                now = engine.ask("metrics")[HITS]
                assert now - hits == 192 + 48
                hits = now

"""Real tensor-parallel vLLM: two ranks store halves, one reads them whole, and the reverse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvstore
from kvstore.hashing import TokenChain
from kvstore.layout import Shard
from tests.daemon.doors import Daemon
from tests.engine.tiny import tiny_model
from tests.engines.conftest import Vllm

pytestmark = pytest.mark.engines

PROMPTS = [list(range(3, 203)), list(range(50, 250))]
FULL = 192  # tokens of each that a load can bring
TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def test_ranks_read_what_other_numbers_of_ranks_have_stored(vllm: Vllm, tmp_path: Path) -> None:
    # vLLM's kernels for CPUs want heads of 32 or more.
    folder = tiny_model(
        tmp_path / "model",
        hidden_size=128,
        head_dim=32,
        num_attention_heads=8,
        num_key_value_heads=4,
        architectures=["LlamaForCausalLM"],
    )
    namespace = kvstore.model_namespace(folder, dtype="float32")
    chains = [TokenChain(namespace, prompt).chain() for prompt in PROMPTS]
    with (
        kvstore.open(ram_bytes="64 MiB") as store,
        Daemon(store, tmp_path / "kvstore.sock") as daemon,
    ):

        def answers(prompts: list[list[int]], **arguments: Any) -> tuple[Any, int]:
            arguments = {"folder": folder, "max_model_len": 512, "block_size": 32, **arguments}
            with vllm({"url": daemon.url}, **arguments) as engine:
                found = [engine.ask("generate", prompts=[p], tokens=8)[0] for p in prompts]
                hits = engine.ask("metrics").get("vllm:external_prefix_cache_hits", 0)
                return found, int(hits)

        by_two, hits = answers(PROMPTS[:1], **TWO)
        assert hits == 0
        for half in namespace.layout.shards(2):
            assert store.probe(chains[0].for_shard(half)).prefix == len(chains[0])
        by_one, hits = answers(PROMPTS)
        assert by_one[:1] == by_two
        assert hits == FULL
        assert store.probe(chains[1].for_shard(Shard(0, 4))).prefix == len(chains[1])
        assert answers(PROMPTS[::-1], **TWO) == (by_one[::-1], 2 * FULL)

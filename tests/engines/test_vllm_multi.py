"""Two connectors under vLLM's MultiConnector: it saves to both, and loads from who has most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kvstore
from kvstore.hashing import TokenChain
from tests.daemon.doors import Daemon
from tests.engines.conftest import Vllm

pytestmark = pytest.mark.engines

NEW = 8
OURS: dict[str, Any] = {
    "kv_connector": "KVStoreConnector",
    "kv_connector_module_path": "kvstore.connectors.vllm",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}


def test_both_stores_are_filled_and_either_is_enough(
    vllm: Vllm, text: list[int], model_folder: Path, tmp_path: Path
) -> None:
    prompts = [text[:330], text[1000:1150]]
    namespace = kvstore.model_namespace(model_folder, dtype="float32")
    with vllm() as engine:
        cold = engine.ask("generate", prompts=prompts, tokens=NEW)
    with (
        kvstore.open(ram_bytes="64 MiB") as one,
        kvstore.open(ram_bytes="64 MiB") as two,
        Daemon(one, tmp_path / "one.sock") as first,
        Daemon(two, tmp_path / "two.sock") as second,
    ):
        each = [{**OURS, "kv_connector_extra_config": {"url": d.url}} for d in (first, second)]
        multi = {"connectors": each}
        with vllm(multi, connector="MultiConnector") as engine:
            assert engine.ask("generate", prompts=prompts, tokens=NEW) == cold
            for store in (one, two):
                for prompt in prompts:
                    chain = TokenChain(namespace, prompt).chain()
                    assert store.probe(chain).prefix == len(chain)
            chain = TokenChain(namespace, prompts[0]).chain()
            one.evict(chain)
            assert engine.ask("reset")
            before = engine.ask("metrics").get("vllm:external_prefix_cache_hits", 0)
            assert engine.ask("generate", prompts=prompts, tokens=NEW) == cold
            hits = engine.ask("metrics")["vllm:external_prefix_cache_hits"] - before
            assert hits == 320 + 144

"""What our engine has stored transformers loads, and the reverse: with one namespace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import kvstore
from kvstore.connectors.accounts import Usage
from kvstore.connectors.transformers import PrefixCache
from kvstore.engine.engine import Engine
from kvstore.engine.sampling import SamplingParams
from tests.engine.tiny import tiny_model

# Progress bars would take a lock that is shared memory.
logging.disable_progress_bar()

PROMPT = list(b"What one engine has computed another one need not compute again. " * 4)
NEW = 24
PARAMS = SamplingParams(max_tokens=NEW, ignore_eos=True)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return tiny_model(path / request.param, model_type=request.param, sliding_window=None)


def engine_over(store: kvstore.BlockStore | None, folder: Path) -> Engine:
    return Engine.from_pretrained(folder, store=store, dtype="float32", hbm_bytes="8 MiB")


def test_each_reads_the_other(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    asked = torch.tensor([PROMPT])
    greedy = {"max_new_tokens": NEW, "do_sample": False}
    their_cold = model.generate(asked, **greedy)[0, len(PROMPT) :].tolist()
    with engine_over(None, folder) as engine:
        our_cold = list(engine.generate([PROMPT], PARAMS)[0].token_ids)
    full = (len(PROMPT) - 1) // 16 * 16

    with kvstore.open(ram_bytes="8 MiB") as store, engine_over(store, folder) as engine:
        engine.generate([PROMPT], PARAMS)
        namespace = kvstore.model_namespace(folder, dtype="float32")
        assert namespace == engine.namespace
        cache = PrefixCache(model, store, namespace=namespace)
        assert cache.generate(asked, **greedy)[0, len(PROMPT) :].tolist() == their_cold
        stats = cache.stats()
        assert stats is not None
        assert stats.usage == Usage(ram_tokens=full, recomputed_tokens=len(PROMPT) - full)

    with kvstore.open(ram_bytes="8 MiB") as store, engine_over(store, folder) as engine:
        cache = PrefixCache(
            model, store, namespace=kvstore.model_namespace(folder, dtype="float32")
        )
        cache.generate(asked, **greedy)
        output = engine.generate([PROMPT], PARAMS)[0]
        assert list(output.token_ids) == our_cold
        assert output.usage.ram_tokens == full


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
def test_quantised_kv_is_left_alone(folder: Path, kv_dtype: str) -> None:
    """transformers computes with no such KV: given its namespace, it does without the store."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    asked = torch.tensor([PROMPT])
    greedy = {"max_new_tokens": NEW, "do_sample": False}
    their_cold = model.generate(asked, **greedy)[0].tolist()
    with (
        kvstore.open(ram_bytes="8 MiB") as store,
        Engine.from_pretrained(
            folder, store=store, dtype="float32", hbm_bytes="8 MiB", kv_dtype=kv_dtype
        ) as engine,
    ):
        engine.generate([PROMPT], PARAMS)
        before = store.stats()
        cache = PrefixCache(model, store, namespace=engine.namespace)
        assert cache.generate(asked, **greedy)[0].tolist() == their_cold
        assert cache.stats() is None
        assert store.stats().ram == before.ram
        assert store.stats().hits == before.hits

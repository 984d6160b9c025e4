"""Naming the blocks of a 128 Ki-token prompt: every token hashed once, chained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from benchmarks import blocks
from benchmarks.harness import Bench, Benchmark
from kvstore.bench.rows import Row
from kvstore.bench.turns import Turn, medians, timed
from kvstore.hashing import TokenChain
from kvstore.identity import HashAlgorithm, Namespace

LIMIT_MS = 10.0
_BLOCK_BYTES = 128 << 10  # of 16 tokens, the default


def measure(bench: Bench) -> Iterator[Row]:
    count = bench.effort.hash_tokens
    tokens = np.random.default_rng(0).integers(0, 128_000, count).tolist()
    plain = blocks.namespace(_BLOCK_BYTES)
    algorithms: tuple[HashAlgorithm, ...] = ("xxh3_128", "sha256")
    spaces = {name: replace(plain, hash_algorithm=name) for name in algorithms}
    for namespace in spaces.values():
        _ = namespace.fingerprint  # once a model, not once a prompt
    turns: dict[str, Turn] = {
        name: timed(partial(_hash, space, tokens)) for name, space in spaces.items()
    }
    seconds = medians(turns, 3 * bench.effort.rounds)
    for name in algorithms:
        yield Row(
            name=f"hashing {count:,} tokens, {name}",
            group="hashing",
            value=seconds[name] * 1000,
            unit="ms",
            ceiling=LIMIT_MS,
            against="the budget",
            at_most=1.0,
            note=f"{plain.block_tokens} tokens a block, from a list of int",
        )


def _hash(namespace: Namespace, tokens: list[int]) -> None:
    TokenChain(namespace, tokens).chain()


BENCHMARKS = (Benchmark("hashing", "hashing", measure),)

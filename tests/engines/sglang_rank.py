"""A rank of SGLang, as tests ask it."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

import numpy as np

import kvstore
from benchmarks.workers.lines import Worker
from kvstore.connectors.sglang_namespace import page_chain
from kvstore.hashing import Chain

NAMESPACE = kvstore.Namespace(
    model="nobody's",
    weights="random",
    tokenizer="none",
    kv_dtype="bfloat16",
    layers=3,
    kv_heads=4,
    head_dim=8,
    block_tokens=16,
    rope="none",
)
SHAPE = [3, 4, 8]
NAMES = map(str, count())


class Rank:
    """One rank in SGLang's process, with pools and a backend of its own."""

    def __init__(self, worker: Worker, url: str, **arguments: Any) -> None:
        extra = {"url": url, "namespace": json.loads(NAMESPACE.to_json())}
        arguments = arguments.copy()
        extra |= arguments.pop("extra", {})
        worker.ask("said")
        self._worker, self._name = worker, next(NAMES)
        worker.ask("open", name=self._name, extra=extra, **{"shape": SHAPE, **arguments})

    def ask(self, what: str, **arguments: Any) -> Any:
        return self._worker.ask("ask", name=self._name, what=what, **arguments)

    def backup(self, tokens: list[int], **arguments: Any) -> int:
        return int(self.ask("backup", tokens=tokens, **arguments))

    def prefetch(self, tokens: list[int], **arguments: Any) -> list[int]:
        """Tokens found, come, and right."""
        return list(self.ask("prefetch", tokens=tokens, **arguments))

    def __enter__(self) -> Rank:
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.ask("close", name=self._name)


def tokens_of(number: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 50_000, number)]


def all_of(tokens: list[int]) -> list[int]:
    return [len(tokens) // 16 * 16] * 3


def chain_of(rank: Rank, tokens: list[int], namespace: kvstore.Namespace = NAMESPACE) -> Chain:
    return page_chain(namespace, rank.ask("keys", tokens=tokens), ())

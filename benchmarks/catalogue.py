"""Every benchmark there is, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from benchmarks import (
    connector_vllm,
    daemon,
    decode,
    engine_vs_transformers,
    engine_vs_vllm,
    hashing,
    nvme,
    peer_lmcache,
    peer_servers,
    probe,
    quantised,
    ram,
    remote,
    restart,
    ttft,
)
from benchmarks.harness import Benchmark

CATALOGUE: tuple[Benchmark, ...] = (
    *hashing.BENCHMARKS,
    *probe.BENCHMARKS,
    *ram.BENCHMARKS,
    *nvme.BENCHMARKS,
    *restart.BENCHMARKS,
    *daemon.BENCHMARKS,
    *remote.BENCHMARKS,
    *peer_servers.BENCHMARKS,
    *peer_lmcache.BENCHMARKS,
    *ttft.BENCHMARKS,
    *decode.BENCHMARKS,
    *quantised.BENCHMARKS,
    *engine_vs_transformers.BENCHMARKS,
    *engine_vs_vllm.BENCHMARKS,
    *connector_vllm.BENCHMARKS,
)


def select(patterns: Iterable[str]) -> list[Benchmark]:
    """Benchmarks whose name or group matches one of the patterns; all without a pattern.

    Raises ValueError for a pattern that matches none.
    """
    wanted = list(patterns)
    for pattern in wanted:
        if not any(_matches(benchmark, pattern) for benchmark in CATALOGUE):
            known = ", ".join(dict.fromkeys(benchmark.group for benchmark in CATALOGUE))
            raise ValueError(f"no benchmark is called {pattern!r}; the groups are {known}")
    return [
        benchmark
        for benchmark in CATALOGUE
        if not wanted or any(_matches(benchmark, pattern) for pattern in wanted)
    ]


def _matches(benchmark: Benchmark, pattern: str) -> bool:
    return fnmatchcase(benchmark.name, pattern) or fnmatchcase(benchmark.group, pattern)

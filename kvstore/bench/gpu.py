"""Every benchmark of `kvstore bench gpu`, in the order in which they run."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch

from kvstore.bench import attention, copies, decode, prompts, sessions
from kvstore.bench.benchmark import Bench, Benchmark
from kvstore.bench.sizes import Sizes
from kvstore.errors import InputError
from kvstore.machine import memory_bytes
from kvstore.version import __version__

_PACKAGES = ("torch", "cupy-cuda13x", "cupy-cuda12x", "flashinfer-python", "flash-attn")


def catalogue(sizes: Sizes) -> list[Benchmark]:
    """Kernels first: the model takes the memory that they need, and stays."""
    return [
        *(
            Benchmark(f"copies/{tokens}", partial(copies.measure, block_tokens=tokens))
            for tokens in sizes.copy_block_tokens
        ),
        Benchmark("attention/bf16", partial(attention.measure, dtype=torch.bfloat16)),
        Benchmark("attention/fp8", partial(attention.measure, dtype=attention.FP8)),
        Benchmark("attention/write", attention.measure_writes),
        Benchmark("decode/graphs", decode.measure_graphs),
        Benchmark("decode/beside", decode.measure_beside),
        Benchmark("decode/offload", decode.measure_offload),
        Benchmark("prompts/ram", prompts.measure_ram),
        Benchmark("prompts/nvme", prompts.measure_nvme),
        Benchmark("sessions", sessions.measure),
    ]


def select(benchmarks: Sequence[Benchmark], names: Sequence[str]) -> list[Benchmark]:
    """Those called one of `names`, or in a group called so; all without any. Raises InputError."""
    known = [benchmark.name for benchmark in benchmarks]
    groups = [name.partition("/")[0] for name in known]
    for name in names:
        if name not in known and name not in groups:
            raise InputError(
                f"no benchmark is called {name!r}; these are: {', '.join(dict.fromkeys(groups))}, "
                f"and of them {', '.join(name for name in known if '/' in name)}"
            )
    return [
        benchmark
        for benchmark, group in zip(benchmarks, groups, strict=True)
        if not names or benchmark.name in names or group in names
    ]


def facts(bench: Bench) -> dict[str, Any]:
    """What the figures were measured on, and with what."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kvstore": __version__,
        "device": bench.card.facts(),
        "model": bench.sizes.model.name,
        "memory_bytes": memory_bytes(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
    }

"""Decoding with offload to RAM and NVMe, beside the same engine without a store."""

from __future__ import annotations

from collections.abc import Iterator

import kvstore
from benchmarks import generation, model
from benchmarks.harness import Bench, Benchmark
from kvstore.bench.rows import NotHereError, Row
from kvstore.bench.turns import medians

AT_LEAST = 0.97
BATCHES = (1, 8)


def measure(bench: Bench) -> Iterator[Row]:
    try:
        import torch
    except ImportError as error:
        raise NotHereError(
            "torch is not installed: pip install -e '.[engine]' in its clone"
        ) from error
    from kvstore.engine.engine import Engine
    from kvstore.engine.loading import load

    loaded = load(model.gguf(), torch.bfloat16)
    steps = bench.effort.decode_tokens
    with (
        kvstore.open(
            ram_bytes="512 MiB", nvme_path=bench.directory / "nvme", nvme_bytes="2 GiB"
        ) as store,
        Engine(loaded, store=store, hbm_bytes="256 MiB") as on,
        Engine(loaded, hbm_bytes="256 MiB") as off,
    ):
        engines = {"on": generation.by_engine(on), "off": generation.by_engine(off)}
        for batch in BATCHES:
            turns = {who: generation.decoding(how, batch, steps) for who, how in engines.items()}
            seconds = medians(turns, bench.effort.rounds)
            store.flush()
            yield Row(
                name=f"decode with offload, batch {batch}",
                group="decode",
                value=batch * steps / seconds["on"],
                unit="tokens/s",
                ceiling=batch * steps / seconds["off"],
                against="the same engine without a store",
                at_least=AT_LEAST,
                checksums="kvstore, of what goes to NVMe",
                note=f"{store.stats().counters['committed_blocks']} blocks offloaded so far",
            )


BENCHMARKS = (Benchmark("decode", "decode", measure),)

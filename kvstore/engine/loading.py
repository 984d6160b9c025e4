"""From a path to a model that runs: a Hugging Face folder or a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kvstore.engine.checkpoint import Checkpoint, Progress
from kvstore.engine.config import ModelConfig
from kvstore.engine.device_name import torch_device
from kvstore.engine.gguf_file import GGUFFile
from kvstore.engine.hf_folder import HFFolder
from kvstore.engine.model import Decoder
from kvstore.engine.tokenizer import Tokenizer
from kvstore.errors import ModelError


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What is needed to talk to a model and to name its KV, but not to compute any."""

    config: ModelConfig
    tokenizer: Tokenizer
    weights_fingerprint: str
    tokenizer_fingerprint: str


@dataclass(frozen=True, slots=True)
class LoadedModel(ModelCard):
    """And a decoder, with its weights in memory."""

    decoder: Decoder


def describe(path: str | Path) -> ModelCard:
    """Headers, tokenizer, and samples of the weights. Blocks for a second.

    Raises ModelError as `load`.
    """
    checkpoint = open_checkpoint(Path(path))
    return ModelCard(
        config=checkpoint.config,
        tokenizer=checkpoint.tokenizer(),
        weights_fingerprint=checkpoint.weights_fingerprint(),
        tokenizer_fingerprint=checkpoint.tokenizer_fingerprint(),
    )


def load(
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> LoadedModel:
    """Load the model at `path`, a folder or a .gguf file. Blocks for seconds.

    Raises ModelError, one line, when there is no model that this decoder can run, and
    SettingsError when the device is not here.
    """
    device = torch_device(device)
    checkpoint = open_checkpoint(Path(path))
    tokenizer = checkpoint.tokenizer()  # first: what is wrong with it shows before the long part
    return LoadedModel(
        decoder=Decoder.load(checkpoint, dtype, device, progress),
        config=checkpoint.config,
        tokenizer=tokenizer,
        weights_fingerprint=checkpoint.weights_fingerprint(),
        tokenizer_fingerprint=checkpoint.tokenizer_fingerprint(),
    )


def open_checkpoint(path: Path) -> Checkpoint:
    """Read headers only. Raises ModelError when `path` is neither a folder nor a GGUF file."""
    if path.is_dir():
        return HFFolder(path)
    if not path.exists():
        raise ModelError(f"there is no model at {path}")
    if path.suffix == ".gguf":
        return GGUFFile(path)
    raise ModelError(f"{path} is neither a model folder nor a .gguf file")

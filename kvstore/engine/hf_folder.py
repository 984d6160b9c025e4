"""A model as Hugging Face stores it: config.json, *.safetensors, tokenizer.json."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvstore.engine.config import ModelConfig, config_from_hf
from kvstore.engine.fingerprint import fingerprint_ranges
from kvstore.engine.tokenizer import Tokenizer
from kvstore.engine.weights import weight_shapes
from kvstore.errors import ModelError

# The format's own bound on a header, so that a wrong file is not read as one.
MAX_HEADER_BYTES = 100_000_000
# Of models without a tokenizer.json. Our engine does not read them, but others run such models.
OTHER_TOKENIZERS = ("tokenizer.model", "tekken.json", "vocab.json", "merges.txt")


# What old converters wrote and no one reads: the frequencies follow from the config.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"


class _Place(NamedTuple):
    """Where a tensor's bytes are, and its shape, rows first."""

    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]


class HFFolder:
    """Reads headers when made, weights when asked. Implements Checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: ModelConfig = _config(path)
        self._headers: dict[Path, bytes] = {}
        self._places: dict[str, _Place] = {}
        for file in self._weight_files():
            self._read_header(file)
        self._match()

    @property
    def weights_bytes(self) -> int:
        return sum(place.nbytes for place in self._places.values())

    def weight_bytes(self, name: str) -> int:
        return self._place(name).nbytes

    def weight(self, name: str) -> Tensor:
        place = self._place(name)
        try:
            with safe_open(str(place.file), framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{place.file} cannot be read: {error}") from error
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise ModelError(f"{name} is {tensor.dtype}: quantised safetensors are not supported")
        return tensor

    def weights_fingerprint(self) -> str:
        """sha256 over every header, sampled bytes, and the norm's epsilon.

        That is the one number on which KV depends and which neither the weights' names
        and shapes nor a `Namespace` tell.
        """
        digest = hashlib.sha256(f"norm_eps={self.config.norm_eps!r}\0".encode())
        for file, header in self._headers.items():
            digest.update(header)
            ranges = [(p.offset, p.nbytes) for p in self._places.values() if p.file == file]
            fingerprint_ranges(digest, file, ranges)
        return digest.hexdigest()

    def tokenizer(self) -> Tokenizer:
        try:
            text = self._tokenizer_json.decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path / 'tokenizer.json'} is not a text in UTF-8") from error
        told = {
            "chat_template": self._chat_template(),
            "special": self._special_tokens(),
            "eos_token_ids": self._eos_token_ids(),
        }
        try:
            return Tokenizer.from_json(text, **told)
        except ModelError as error:
            raise ModelError(f"{self.path}: {error}") from error

    def tokenizer_fingerprint(self) -> str:
        """Of tokenizer.json, or else of what other engines take, if there is any of it."""
        if (self.path / "tokenizer.json").exists():
            return hashlib.sha256(self._tokenizer_json).hexdigest()
        files = [self.path / name for name in OTHER_TOKENIZERS if (self.path / name).exists()]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    @cached_property
    def _tokenizer_json(self) -> bytes:
        file = self.path / "tokenizer.json"
        try:
            return file.read_bytes()
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}") from error

    @cached_property
    def _tokenizer_config(self) -> Mapping[str, Any]:
        file = self.path / "tokenizer_config.json"
        return _read_json(file) if file.exists() else {}

    def _chat_template(self) -> str | None:
        file = self.path / "chat_template.jinja"
        try:
            if file.exists():
                return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file} cannot be read: {error}") from error
        template = self._tokenizer_config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[-1].get("template") if named else None
        if template is not None and not isinstance(template, str):
            raise ModelError(f"{self.path / 'tokenizer_config.json'}: chat_template is not a text")
        return template

    def _special_tokens(self) -> dict[str, str]:
        special = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = self._tokenizer_config.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if value:
                special[name] = str(value)
        return special

    def _eos_token_ids(self) -> tuple[int, ...]:
        for name in ("generation_config.json", "config.json"):
            file = self.path / name
            eos = _read_json(file).get("eos_token_id") if file.exists() else None
            if eos is not None:
                ids = eos if isinstance(eos, list) else [eos]
                if not all(isinstance(token, int) for token in ids):
                    raise ModelError(f"{file}: eos_token_id is {eos!r}, not a token id")
                return tuple(ids)
        return ()

    def _weight_files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            weight_map = _read_json(index).get("weight_map")
            names = weight_map.values() if isinstance(weight_map, dict) else ()
            if not names or not all(isinstance(name, str) for name in names):
                raise ModelError(f"{index} has no weight_map from weights to files")
            return [self.path / name for name in sorted(set(names))]
        single = self.path / "model.safetensors"
        if single.exists():
            return [single]
        raise ModelError(f"{self.path} has no model.safetensors (nor an index of shards)")

    def _read_header(self, file: Path) -> None:
        try:
            with file.open("rb") as stream:
                size = stream.seek(0, 2)
                stream.seek(0)
                (length,) = struct.unpack("<Q", stream.read(8))
                if length > min(size, MAX_HEADER_BYTES):
                    raise ModelError(f"{file} is not a safetensors file")
                header = stream.read(length)
            self._headers[file] = header
            for name, entry in json.loads(header).items():
                if name == "__metadata__":
                    continue
                start, end = entry["data_offsets"]
                if 8 + length + end > size:
                    raise ModelError(f"{file} is cut short: {name} ends past its end")
                shape = tuple(entry["shape"])
                self._places[name] = _Place(file, 8 + length + start, end - start, shape)
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}") from error
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} is not a safetensors file") from error

    def _match(self) -> None:
        """Refuse weights that are not those of the config: all of them, and no others."""
        shapes = weight_shapes(self.config)
        for name, shape in shapes.items():
            if self._place(name).shape != shape:
                theirs = self._place(name).shape
                raise ModelError(f"{self.path} has {name} of shape {theirs}, not {shape}")
        # Of tied embeddings some files hold both; theirs are the same.
        known = shapes.keys() | {"lm_head.weight"}
        # A tensor without a use means a model that computes something we do not.
        for name in sorted(self._places.keys() - known):
            if not name.endswith(_IGNORED_SUFFIX):
                raise ModelError(f"{self.path} has a weight {name}, which is not supported")

    def _place(self, name: str) -> _Place:
        try:
            return self._places[name]
        except KeyError:
            raise ModelError(f"{self.path} has no weight {name}") from None


def _config(folder: Path) -> ModelConfig:
    fields = _read_config(folder)
    try:
        return config_from_hf(fields, _model_name(folder.resolve()))
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error


def _model_name(folder: Path) -> str:
    """The folder's own, or the model's where the hub's cache has named it after a commit."""
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.split("--")[-1]
    return folder.name


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        there = sorted(folder.iterdir())
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error.strerror}") from error
    if folder / "config.json" in there:
        return _read_json(folder / "config.json")
    gguf = next((file for file in there if file.suffix == ".gguf"), None)
    if gguf is not None:
        raise ModelError(f"{folder} has no config.json; for the GGUF model in it give {gguf}")
    raise ModelError(f"{folder} holds no model: neither config.json nor a GGUF file")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} does not hold a JSON object")
    return value

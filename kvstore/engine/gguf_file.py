"""A model in one GGUF file (as llama.cpp stores it)."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from kvstore.engine.config import ModelConfig, config_from_gguf
from kvstore.engine.fingerprint import fingerprint_ranges
from kvstore.engine.gguf_header import GGUFHeader, TensorPlace, read_header
from kvstore.engine.gguf_tokenizer import tokenizer_from_gguf
from kvstore.engine.tokenizer import Tokenizer
from kvstore.engine.weights import weight_shapes
from kvstore.errors import ModelError

# Hugging Face names of modules, and those of GGUF.
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROPE_FACTORS = "rope_freqs.weight"
# What old converters wrote and no one reads: the frequencies follow from the metadata.
_IGNORED_SUFFIX = ".attn_rot_embd.weight"

# Types that torch has as well. All others go through float32.
_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# Dequantised at a time, so that what the arithmetic needs besides its result stays small.
CHUNK_ELEMENTS = 1 << 20


class GGUFFile:
    """Reads the header when made, weights when asked. Implements Checkpoint.

    Weights are read, not mapped: all of them are converted, so a map would save nothing,
    and a file that shrinks while it is read is then an error instead of a crash.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header: GGUFHeader = read_header(path)
        if self._header.metadata.get("split.count", 1) != 1:
            raise ModelError(f"{path} is one part of a split GGUF; merge the parts first")
        self.config: ModelConfig = self._config()
        self._names = self._match(self.config)
        self._refuse_unknown_types()

    @property
    def weights_bytes(self) -> int:
        return sum(self._header.tensors[name].nbytes for name in self._names.values())

    def weight_bytes(self, name: str) -> int:
        return self._header.tensors[self._gguf_name(name)].nbytes

    def weight(self, name: str) -> Tensor:
        """A new tensor: float32, or the file's own float16 or bfloat16."""
        tensor = self._read(self._gguf_name(name))
        if self.config.architecture != "llama":
            return tensor
        if ".q_proj." in name:
            return _halves_from_pairs(tensor, self.config.heads)
        if ".k_proj." in name:
            return _halves_from_pairs(tensor, self.config.kv_heads)
        return tensor

    def tokenizer(self) -> Tokenizer:
        return tokenizer_from_gguf(self._header.metadata)

    def weights_fingerprint(self) -> str:
        """sha256 over the header and sampled bytes of every tensor."""
        digest = hashlib.sha256()
        places = self._header.tensors.values()
        try:
            with self.path.open("rb") as file:
                digest.update(file.read(self._header.nbytes))
            fingerprint_ranges(digest, self.path, [(p.offset, p.nbytes) for p in places])
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read: {error.strerror}") from error
        return digest.hexdigest()

    def tokenizer_fingerprint(self) -> str:
        metadata = self._header.metadata
        fields = {key: metadata[key] for key in metadata if key.startswith("tokenizer.ggml.")}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def _config(self) -> ModelConfig:
        tensors = self._header.tensors
        return config_from_gguf(
            self._header.metadata,
            {name: place.shape for name, place in tensors.items()},
            self._read(_ROPE_FACTORS).flatten().tolist() if _ROPE_FACTORS in tensors else None,
        )

    def _gguf_name(self, name: str) -> str:
        try:
            return self._names[name]
        except KeyError:
            raise ModelError(f"{self.path} has no weight {name}") from None

    def _match(self, config: ModelConfig) -> dict[str, str]:
        """Hugging Face names to GGUF names, for all weights and no others."""
        tensors = self._header.tensors
        if config.layers > len(tensors):
            raise ModelError(f"{self.path} has fewer tensors than layers ({config.layers})")
        names = {}
        for name, shape in weight_shapes(config).items():
            names[name] = theirs = gguf_name(name)
            if theirs not in tensors:
                raise ModelError(f"{self.path} has no tensor {theirs}")
            if tensors[theirs].shape != shape:
                raise ModelError(
                    f"{self.path} has {theirs} of shape {tensors[theirs].shape}, not {shape}"
                )
        # A tensor without a use means a model that computes something we do not.
        for theirs in tensors.keys() - names.values() - {_ROPE_FACTORS}:
            if not theirs.endswith(_IGNORED_SUFFIX):
                raise ModelError(f"{self.path} has a tensor {theirs}, which is not supported")
        return names

    def _refuse_unknown_types(self) -> None:
        """Before seconds are spent on the tensors that come first."""
        tensors = self._header.tensors
        for kind in {tensors[name].type for name in self._names.values()} - _PLAIN.keys():
            _, block_bytes = GGML_QUANT_SIZES[kind]
            try:
                dequantize(np.zeros((1, block_bytes), np.uint8), kind)
            except NotImplementedError as error:
                raise ModelError(
                    f"{self.path} is quantised as {kind.name}, which is not supported"
                ) from error

    def _read(self, name: str) -> Tensor:
        place = self._header.tensors[name]
        try:
            data = np.fromfile(self.path, np.uint8, place.nbytes, offset=place.offset)
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read: {error.strerror}") from error
        if data.nbytes != place.nbytes:
            raise ModelError(f"{self.path} is cut short: {name} ends past its end")
        if place.type in _PLAIN:
            return torch.from_numpy(data).view(_PLAIN[place.type]).view(place.shape)
        return _dequantized(data, place)


def gguf_name(name: str) -> str:
    """A Hugging Face weight name as GGUF has it."""
    module, kind = name.rsplit(".", 1)
    if module in _OUTER:
        return f"{_OUTER[module]}.{kind}"
    layer, inner = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_INNER[inner]}.{kind}"


def _dequantized(data: np.ndarray, place: TensorPlace) -> Tensor:
    columns = place.shape[-1]
    rows = math.prod(place.shape) // columns
    blocks = data.reshape(rows, -1)
    result = torch.empty(rows, columns)
    floats, step = result.numpy(), max(1, CHUNK_ELEMENTS // columns)
    for row in range(0, rows, step):
        floats[row : row + step] = dequantize(blocks[row : row + step], place.type)
    return result.view(place.shape)


def _halves_from_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows of Q or K from GGUF's order for RoPE, pairs side by side, to ours, halves apart.

    Only files of architecture "llama" have them in pairs.
    """
    shape = tensor.shape
    pairs = tensor.view(heads, shape[0] // heads // 2, 2, *shape[1:])
    return pairs.transpose(1, 2).reshape(shape)

"""A model in one GGUF file, as llama.cpp stores it."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from kvstore.engine.config import ModelConfig, config_from_gguf
from kvstore.engine.fingerprint import fingerprint_ranges
from kvstore.engine.gguf_header import TensorInfo, read_header
from kvstore.engine.gguf_tokenizer import tokenizer_from_gguf
from kvstore.engine.tokenizer import Tokenizer
from kvstore.errors import ModelError

# Hugging Face name -> GGUF name, of the weights of one layer.
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


class GGUFFile:
    """Reads the header when made, weights when asked. Implements Checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self._metadata = header.metadata
        self._tensors = header.tensors
        self._data_offset = header.data_offset
        if int(self._metadata.get("split.count", 1)) > 1:
            raise ModelError(f"{path} is one part of a split GGUF; merge the parts first")
        self._check_length()
        self.config = self._config()

    @property
    def weights_bytes(self) -> int:
        return sum(_stored_bytes(info) for info in self._tensors.values())

    def weight_bytes(self, name: str) -> int:
        return _stored_bytes(self._info(name))

    def weight(self, name: str) -> Tensor:
        weight = self._read(self._info(name))
        # llama.cpp rotates neighbours (2i, 2i + 1), Hugging Face the halves (i, i + dim/2),
        # so the converter has reordered the rows of Q and K of Llama files.
        if self._metadata["general.architecture"] == "llama":
            if ".q_proj." in name:
                return _unpermute(weight, self.config.heads)
            if ".k_proj." in name:
                return _unpermute(weight, self.config.kv_heads)
        return weight

    def weights_fingerprint(self) -> str:
        """sha256 over the header and sampled bytes of every tensor."""
        digest = hashlib.sha256()
        with self.path.open("rb") as stream:
            digest.update(stream.read(self._data_offset))
        ranges = [
            (self._data_offset + info.offset, _stored_bytes(info))
            for info in self._tensors.values()
        ]
        fingerprint_ranges(digest, self.path, ranges)
        return digest.hexdigest()

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def tokenizer_fingerprint(self) -> str:
        """sha256 over the metadata that tokenization depends on."""
        fields = {
            name: value
            for name, value in self._metadata.items()
            if name.startswith("tokenizer.ggml.")
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return tokenizer_from_gguf(self._metadata)

    def _config(self) -> ModelConfig:
        shapes = {name: info.shape for name, info in self._tensors.items()}
        factors = self._tensors.get("rope_freqs.weight")
        return config_from_gguf(
            self._metadata,
            shapes,
            rope_factors=None if factors is None else self._read(factors).tolist(),
        )

    def _check_length(self) -> None:
        size = self.path.stat().st_size
        for name, info in self._tensors.items():
            if self._data_offset + info.offset + _stored_bytes(info) > size:
                raise ModelError(f"{self.path} is cut short: {name} ends past its end")

    def _info(self, name: str) -> TensorInfo:
        stored = _NAMES.get(name) or _layer_name(name)
        if stored not in self._tensors:
            raise ModelError(f"{self.path} has no weight {stored}")
        return self._tensors[stored]

    def _read(self, info: TensorInfo) -> Tensor:
        offset, length = self._data_offset + info.offset, _stored_bytes(info)
        data = np.memmap(self.path, np.uint8, "r", offset, (length,))
        kind = GGMLQuantizationType(info.kind)
        try:
            values = gguf.dequantize(np.array(data), kind)
        except NotImplementedError as error:
            raise ModelError(f"GGUF tensors of type {kind.name} are not supported") from error
        return torch.from_numpy(values.reshape(info.shape).astype(np.float32, copy=False))


def _layer_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    _, _, number, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{number}.{_LAYER_NAMES[module]}.{kind}"


def _stored_bytes(info: TensorInfo) -> int:
    try:
        block_values, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(info.kind)]
    except (KeyError, ValueError) as error:
        raise ModelError(f"GGUF tensors of type {info.kind} are not supported") from error
    count = 1
    for size in info.shape:
        count *= size
    return count // block_values * block_bytes


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    rows = weight.shape[0]
    pairs = weight.view(heads, rows // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)

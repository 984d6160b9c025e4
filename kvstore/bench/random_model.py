"""A model of a given shape with random weights: as fast as one that has learnt something."""

from __future__ import annotations

import torch
from torch import Tensor

from kvstore.bench.sizes import weight_count
from kvstore.engine.config import ModelConfig
from kvstore.engine.loading import LoadedModel
from kvstore.engine.model import Decoder
from kvstore.engine.tokenizer import Tokenizer

# Knows one word. Prompts are given as tokens, and nobody reads the answers.
_TOKENIZER = """{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
"normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
"model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}}"""


class RandomCheckpoint:
    """A checkpoint that is on no disk: weights come from a seed, made on the device.

    For Llamas without biases. Matrices keep the size of what goes through them.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        self.config = config
        self._dtype = dtype
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)
        self._shapes = _shapes(config)

    @property
    def weights_bytes(self) -> int:
        return weight_count(self.config) * self._dtype.itemsize

    def weight_bytes(self, name: str) -> int:
        return self._shape(name).numel() * self._dtype.itemsize

    def weight(self, name: str) -> Tensor:
        """Another one at each call."""
        shape = self._shape(name)
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        made = torch.empty(shape, dtype=self._dtype, device=self._device)
        return made.normal_(0.0, shape[1] ** -0.5, generator=self._generator)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_json(_TOKENIZER)

    def weights_fingerprint(self) -> str:
        return "random"

    def tokenizer_fingerprint(self) -> str:
        return "none"

    def _shape(self, name: str) -> torch.Size:
        own = name.removeprefix("model.").removeprefix("layers.")
        number, dot, rest = own.partition(".")
        return self._shapes[rest if dot and number.isdigit() else own]


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """On `device`, in seconds."""
    checkpoint = RandomCheckpoint(config, dtype, device)
    return LoadedModel(
        config=config,
        tokenizer=checkpoint.tokenizer(),
        weights_fingerprint=checkpoint.weights_fingerprint(),
        tokenizer_fingerprint=checkpoint.tokenizer_fingerprint(),
        decoder=Decoder.load(checkpoint, dtype, device),
    )


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    hidden, wide = config.hidden_size, config.intermediate_size
    shapes = {
        "embed_tokens.weight": (config.vocab_size, hidden),
        "norm.weight": (hidden,),
        "lm_head.weight": (config.vocab_size, hidden),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (config.query_size, hidden),
        "self_attn.k_proj.weight": (config.kv_size, hidden),
        "self_attn.v_proj.weight": (config.kv_size, hidden),
        "self_attn.o_proj.weight": (hidden, config.query_size),
        "mlp.gate_proj.weight": (wide, hidden),
        "mlp.up_proj.weight": (wide, hidden),
        "mlp.down_proj.weight": (hidden, wide),
    }
    return {name: torch.Size(shape) for name, shape in shapes.items()}

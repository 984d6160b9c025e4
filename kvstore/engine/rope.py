"""Rotary position embedding: its parameters, their canonical text, and the tables.

Rotary embedding: Su et al., arXiv:2104.09864, in the half-split form (element i is
paired with i + dim/2). Scaling "linear" divides every frequency by a factor (Chen
et al., arXiv:2306.15595); "llama3" divides the low ones only, with a ramp between
(the Llama 3.1 release); "factors" divides each frequency by a number of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kvstore.errors import ModelError


@dataclass(frozen=True, slots=True)
class Rope:
    """All that the rotation of one head depends on besides the position."""

    theta: float
    dim: int
    scaling: Literal["none", "linear", "llama3", "factors"] = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 1.0
    original_context_tokens: int = 0
    factors: tuple[float, ...] = ()

    def canonical(self) -> str:
        """One text for one set of parameters: what a `Namespace` carries as `rope`."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    def with_factors(self, factors: Sequence[float]) -> Rope:
        """The same rotation with frequency i divided by `factors[i]` (GGUF's rope_freqs)."""
        if len(factors) != self.dim // 2:
            raise ModelError(f"{len(factors)} RoPE factors for {self.dim // 2} frequencies")
        if self.scaling != "none":
            raise ModelError(f"RoPE factors on top of scaling {self.scaling!r} are not supported")
        return replace(self, scaling="factors", factors=tuple(factors))

    def frequencies(self) -> Tensor:
        """Radians a position for each pair: float32 [dim / 2]."""
        exponent = torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim
        plain = 1.0 / (self.theta**exponent)
        if self.scaling == "linear":
            return plain / self.factor
        if self.scaling == "factors":
            return plain / torch.tensor(self.factors)
        if self.scaling == "llama3":
            return self._llama3(plain)
        return plain

    def _llama3(self, plain: Tensor) -> Tensor:
        """Keep short waves, stretch long ones by `factor`, and ramp between the two bounds."""
        wavelength = 2 * math.pi / plain
        low, high = self.low_frequency_factor, self.high_frequency_factor
        ramp = (self.original_context_tokens / wavelength - low) / (high - low)
        ramp = ramp.clamp(0.0, 1.0)
        return (1 - ramp) * plain / self.factor + ramp * plain

    def tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine, float32 [positions, dim / 2] each."""
        angles = torch.outer(torch.arange(positions).float(), self.frequencies())
        return angles.cos(), angles.sin()


def rope_from_hf(fields: Mapping[str, Any], dim: int) -> Rope:
    """From config.json: `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling`."""
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or fields.get("rope_theta") or 10_000.0)
    partial = scaling.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise ModelError("RoPE over a part of the head (partial_rotary_factor) is not supported")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return Rope(theta, dim)
    if kind == "linear":
        return Rope(theta, dim, "linear", float(scaling["factor"]))
    if kind == "llama3":
        return Rope(
            theta,
            dim,
            "llama3",
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            int(scaling["original_max_position_embeddings"]),
        )
    raise ModelError(f"RoPE scaling {kind!r} is not supported; none, linear and llama3 are")


def rope_from_gguf(metadata: Mapping[str, Any], architecture: str, dim: int) -> Rope:
    """From GGUF metadata. Llama 3 scaling comes as a tensor: see `Rope.with_factors`."""
    prefix = f"{architecture}.rope."
    theta = float(metadata.get(prefix + "freq_base", 10_000.0))
    if int(metadata.get(prefix + "dimension_count", dim)) != dim:
        raise ModelError("RoPE over a part of the head (rope.dimension_count) is not supported")
    kind = metadata.get(prefix + "scaling.type", "linear")
    factor = float(metadata.get(prefix + "scaling.factor", 1.0))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return Rope(theta, dim)
    if kind == "linear":
        return Rope(theta, dim, "linear", factor)
    raise ModelError(f"RoPE scaling {kind!r} is not supported; none and linear are, in a GGUF")

"""A matrix product with fixed weights, in the fastest form that the device has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# With fewer rows BLAS takes other kernels, which add in another order: a token decoded alone
# would differ in its last bits from the same token in a prompt. They are slower, too.
MIN_ROWS = 4

# oneDNN chooses a layout for this many rows; any number may then be multiplied. Measured:
# layouts for 64 rows and more are the same, and the best for few rows as well.
LAYOUT_ROWS = 64


class Linear:
    """`x @ weight.T + bias`, alone or with what follows it; x is [rows, inputs].

    `weight` is [outputs, inputs]. On a CPU it is laid out once for oneDNN instead of in
    every call, as `torch.nn.functional.linear` does it: twice as fast for few rows. What
    follows is computed by the same kernel while a result is in registers.

    With at least MIN_ROWS rows a row's result does not depend on the others, nor on how
    many there are (docs/adr/0020-determinism.md).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._bias = bias
        self._packed = _pack(weight)
        self._weight = weight[:0] if self._packed is not None else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is None:
            return functional.linear(x, self._weight, self._bias)
        return _mkldnn_linear(x, self._packed, self._bias, "none")

    def in_float32(self) -> Linear:
        """The same weights, in memory of their own."""
        packed, bias = self._packed, self._bias
        weight = self._weight if packed is None else packed.to_dense()
        return Linear(weight.float(), None if bias is None else bias.float())

    def silu(self, x: Tensor) -> Tensor:
        """silu(self(x))"""
        if self._packed is None:
            return functional.silu(functional.linear(x, self._weight, self._bias))
        return _mkldnn_linear(x, self._packed, self._bias, "swish")

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """self(x) * factor"""
        if self._packed is None:
            return functional.linear(x, self._weight, self._bias) * factor
        return _mkldnn_binary(x, factor, self._packed, self._bias, "mul")

    def plus(self, x: Tensor, term: Tensor) -> Tensor:
        """self(x) + term"""
        if self._packed is None:
            return functional.linear(x, self._weight, self._bias) + term
        return _mkldnn_binary(x, term, self._packed, self._bias, "add")


def _mkldnn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, then: str) -> Tensor:
    out: Tensor = _pointwise(x, weight, bias, then, [], "")
    return out


def _mkldnn_binary(
    x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, op: str
) -> Tensor:
    out: Tensor = _pointwise.binary(x, other, weight, bias, op)
    return out


_pointwise: Any = torch.ops.mkldnn._linear_pointwise


def _pack(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's layout, or None where oneDNN cannot compute with it."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return None
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, LAYOUT_ROWS)
    return packed

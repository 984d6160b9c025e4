"""KV of one byte an element: int8 or fp8 (e4m3, arXiv:2209.05433), each times a scale.

Scales are float32 [kv_heads, layers, 2]: one for K and one for V of a head of a layer, given
once. What `write_kv` and `paged_attention` do on CUDA, in plain torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# What copies of these dtypes, as `widen` makes them, are still to be multiplied by.
UNIT = {torch.float8_e4m3fn: 256.0, torch.int8: 1.0}


def quantise(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` divided by `scales`, rounded to nearest even, cut at the largest number of `dtype`.

    Division, not a product with the inverse: the same bits as on CUDA.
    """
    limit = LARGEST[dtype]
    scaled = values.float().div(scales).clamp_(-limit, limit)
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype)


def widen(source: Tensor, target: Tensor) -> None:
    """Write `source` to `target`, float32, divided by its dtype's UNIT if it has one. Exact.

    e4m3 has the exponents and mantissas of float16 cut short, so that its bits, moved, are
    those of a float16 number 2**8 smaller, subnormal ones too. Torch on a CPU converts e4m3
    one by one, ten times slower.
    """
    if source.dtype == torch.float8_e4m3fn:
        bits = source.view(torch.int8).to(torch.int16).bitwise_left_shift_(7)
        source = bits.bitwise_and_(~(1 << 14)).view(torch.float16)  # the sign stands there twice
    target.copy_(source)

"""New keys and values into the pages of the KV tensor, on a CUDA device: csrc/write_kv.cu."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvstore.kernels.cuda_module import Runtime, address, runtime_of
from kvstore.kernels.cuda_tensors import HEAD_DIMS as HEAD_DIMS
from kvstore.kernels.cuda_tensors import (
    check,
    check_aligned,
    check_kv,
    check_scales,
    element_name,
)

SOURCE = "write_kv.cu"
THREADS = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KV_DTYPES = (*DTYPES, torch.float8_e4m3fn, torch.int8)


class Rotation(NamedTuple):
    """Rotary embedding of keys in the half-split form (kvstore/engine/rope.py).

    `positions` int64 [T]; `cosines` and `sines` float32 [positions, head_dim / 2], with a row
    for every position that occurs.
    """

    positions: Tensor
    cosines: Tensor
    sines: Tensor


def write_kv(
    key: Tensor,
    value: Tensor,
    kv: Tensor,
    layer: int,
    slots: Tensor,
    rotation: Rotation | None = None,
    scales: Tensor | None = None,
    runtime: Runtime | None = None,
) -> None:
    """Write keys and values of T tokens to one layer of `kv`, token t to slot `slots[t]`.

    - `key`, `value` [T, kv_heads, head_dim], both bf16, fp16 or fp32; the last two dimensions
      are dense. They may be parts of the rows of one projection.
    - `kv` [kv_heads, layers, 2, slots, head_dim] bf16, fp16, fp32, fp8 (e4m3) or int8, dense.
    - `slots` int64 [T], block * block_tokens + offset, no two alike; a row with a negative one
      pads the batch and is not written.
    - With `rotation` keys are rotated in float32 first.
    - `scales` float32 [kv_heads, layers, 2]: K and V of fp8 and int8 are divided by them,
      rounded to nearest even, and cut at the largest number there is.

    Runs on torch's current stream and does not block; slots and positions are read on the
    device alone. Raises KernelError for tensors that do not fit, before anything is launched.
    """
    runtime = runtime or runtime_of(kv)
    check_kv(kv, layer, KV_DTYPES, runtime)
    check_scales(scales, kv)
    _check(key, value, kv, slots)
    if rotation is not None:
        _check_rotation(rotation, len(slots), kv)
    kv_heads, layers, _, slot_count, head_dim = kv.shape
    vector = 16 // max(key.element_size(), kv.element_size())
    threads = len(slots) * kv_heads * (head_dim // 2 // vector)
    if threads == 0:
        return
    positions, cosines, sines = rotation or (None, None, None)
    runtime.launch(
        SOURCE,
        f"write_kv<{element_name(key)}, {element_name(kv)}, {head_dim}>",
        (-(-threads // THREADS),),
        (THREADS,),
        (
            address(key),
            np.int64(key.stride(0)),
            address(value),
            np.int64(value.stride(0)),
            address(slots),
            address(positions),
            address(cosines),
            address(sines),
            address(None if scales is None else scales[:, layer]),
            np.int32(layers * 2),
            address(kv[:, layer]),
            np.int64(kv.stride(0)),
            np.int64(slot_count * head_dim),
            np.int32(len(slots)),
            np.int32(kv_heads),
        ),
    )


def _check(key: Tensor, value: Tensor, kv: Tensor, slots: Tensor) -> None:
    check("key", key, (len(slots), kv.shape[0], kv.shape[4]), DTYPES, kv.device, 2)
    check("value", value, key.shape, (key.dtype,), kv.device, 2)
    check_aligned("key", key)
    check_aligned("value", value)
    check("slots", slots, (len(slots),), (torch.int64,), kv.device)


def _check_rotation(rotation: Rotation, tokens: int, kv: Tensor) -> None:
    table = (len(rotation.cosines), kv.shape[4] // 2)
    check("positions", rotation.positions, (tokens,), (torch.int64,), kv.device)
    check("cosines", rotation.cosines, table, (torch.float32,), kv.device)
    check("sines", rotation.sines, table, (torch.float32,), kv.device)

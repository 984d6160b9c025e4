"""New keys and values land in their slots, bit for bit as in the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvstore.engine.rope import Rope
from kvstore.engine.rotary import Rotary, rotate
from kvstore.errors import KernelError
from kvstore.kernels import reference
from kvstore.kernels.cuda_module import Runtime
from kvstore.kernels.write_kv_cuda import HEAD_DIMS, KV_DTYPES, Rotation, write_kv
from tests.kernels.emulator import EmulatedRuntime

LAYERS, KV_HEADS, SLOTS, TOKENS = 2, 3, 48, 7


def projection(dtype: torch.dtype, head_dim: int, device: str) -> tuple[Tensor, Tensor]:
    """Keys and values as parts of rows that hold queries as well."""
    rows = torch.randn(TOKENS, 4 + 2 * KV_HEADS, head_dim, device=device).mul(3).to(dtype)
    return rows[:, 4 : 4 + KV_HEADS], rows[:, 4 + KV_HEADS :]


def empty_kv(dtype: torch.dtype, head_dim: int, device: str) -> Tensor:
    """Every bit pattern, so that a byte written by mistake is seen."""
    shape = (KV_HEADS, LAYERS, 2, SLOTS, head_dim * dtype.itemsize)
    return torch.randint(0, 256, shape, device=device).to(torch.uint8).view(dtype)


def some_slots(device: str) -> Tensor:
    slots = torch.randperm(SLOTS, device=device)[:TOKENS]
    slots[3] = -1
    return slots


def rotation_of(head_dim: int, device: str) -> Rotation:
    cosines, sines = Rope(1e5, head_dim).tables(9000)
    positions = torch.randint(0, 9000, (TOKENS,), device=device)
    return Rotation(positions, cosines.to(device), sines.to(device))


def scales_for(kv: Tensor) -> Tensor | None:
    """Such that some numbers are too large: they are cut."""
    if kv.element_size() > 1:
        return None
    largest = 448 if kv.dtype == torch.float8_e4m3fn else 127
    return (torch.rand(KV_HEADS, LAYERS, 2, device=kv.device) + 0.5) * 6 / largest


CASES = [
    *((torch.bfloat16, torch.bfloat16, head_dim) for head_dim in HEAD_DIMS),
    *((torch.float32, kv_dtype, 64) for kv_dtype in KV_DTYPES),
    (torch.float16, torch.float16, 80),
    (torch.bfloat16, torch.float8_e4m3fn, 80),
    (torch.bfloat16, torch.int8, 256),
]


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize(("dtype", "kv_dtype", "head_dim"), CASES)
def test_as_the_reference_and_nothing_else(
    dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, rotated: bool, runtime: Runtime
) -> None:
    device = runtime.device_type
    key, value = projection(dtype, head_dim, device)
    kv = empty_kv(kv_dtype, head_dim, device)
    slots = some_slots(device)
    rotation = rotation_of(head_dim, device) if rotated else None
    scales = scales_for(kv)
    wanted = kv.clone()
    reference.write_kv(key, value, wanted, 1, slots, rotation, scales)
    write_kv(key, value, kv, 1, slots, rotation, scales, runtime)
    assert torch.equal(kv.view(torch.uint8), wanted.view(torch.uint8))


def test_rotated_as_the_engine_does_it(runtime: Runtime) -> None:
    device = runtime.device_type
    key, value = projection(torch.bfloat16, 64, device)
    kv = torch.zeros(KV_HEADS, LAYERS, 2, SLOTS, 64, dtype=torch.bfloat16, device=device)
    slots = torch.arange(TOKENS, device=device)
    positions = torch.randint(0, 500, (TOKENS,), device=device)
    rope = Rope(1e4, 64)
    cosines, sines = rope.tables(500)
    rotation = Rotation(positions, cosines.to(device), sines.to(device))
    write_kv(key, value, kv, 0, slots, rotation, runtime=runtime)
    cos, sin = Rotary(rope, torch.device(device)).at(positions, 500)
    wanted = rotate(key.float(), cos, sin).to(torch.bfloat16)
    assert torch.equal(kv[:, 0, 0, :TOKENS], wanted.transpose(0, 1))
    assert torch.equal(kv[:, 0, 1, :TOKENS], value.transpose(0, 1))


def test_no_tokens_is_no_launch(runtime: Runtime) -> None:
    device = runtime.device_type
    kv = empty_kv(torch.bfloat16, 64, device)
    none = torch.empty(0, KV_HEADS, 64, dtype=torch.bfloat16, device=device)
    before = kv.clone()
    write_kv(none, none, kv, 0, torch.empty(0, dtype=torch.int64, device=device), runtime=runtime)
    assert torch.equal(kv.view(torch.uint8), before.view(torch.uint8))


def test_what_does_not_fit_is_refused(emulated: EmulatedRuntime) -> None:
    key = torch.zeros(TOKENS, KV_HEADS, 64)
    kv = torch.zeros(KV_HEADS, LAYERS, 2, SLOTS, 64)
    slots = torch.arange(TOKENS)
    scales = torch.ones(KV_HEADS, LAYERS, 2)
    table = torch.zeros(10, 32)

    def refused(match: str, **changed: object) -> None:
        arguments = {"key": key, "value": key, "kv": kv, "layer": 0, "slots": slots, **changed}
        with pytest.raises(KernelError, match=match):
            write_kv(**arguments, runtime=emulated)  # type: ignore[arg-type]

    refused("kv is .* on cpu", kv=kv[0])
    refused("72 elements", kv=torch.zeros(KV_HEADS, LAYERS, 2, SLOTS, 72))
    refused("no layer 2 of 2", layer=2)
    refused("kv is float64", kv=kv.double())
    refused("does not lie densely", kv=kv.transpose(3, 4).contiguous().transpose(3, 4))
    refused("key is", key=key[:, :2])
    refused("value is bfloat16", value=key.bfloat16())
    refused("value .* densely", value=key.transpose(1, 2).contiguous().transpose(1, 2))
    refused("key has rows", key=torch.zeros(key.numel() + 1)[1:].view(key.shape))
    refused("slots is int32", slots=slots.int())
    refused("slots is", slots=slots[:, None])
    refused("with scales", scales=scales)
    refused("without scales", kv=kv.to(torch.int8))
    refused("scales is", kv=kv.to(torch.int8), scales=scales[:2])
    refused("positions is", rotation=Rotation(slots[:3], table, table))
    refused("cosines is", rotation=Rotation(slots, table[:, :8], table))
    refused("sines is", rotation=Rotation(slots, table, table.double()))

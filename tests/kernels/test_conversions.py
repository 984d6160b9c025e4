"""Numbers of the kernels' types are those of torch's; beyond the largest is the largest."""

from __future__ import annotations

from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kvstore.kernels.cuda_module import address
from tests.kernels.emulator import SOURCES, EmulatedRuntime

SOURCE = """
#include "common.cuh"
template <typename T>
__global__ void encode(const float* in, T* out) {
  out[blockIdx.x * 64 + threadIdx.x] = from_float<T>(in[blockIdx.x * 64 + threadIdx.x]);
}
template <typename T>
__global__ void decode(const T* in, float* out) {
  out[blockIdx.x * 64 + threadIdx.x] = to_float(in[blockIdx.x * 64 + threadIdx.x]);
}
"""
TYPES = {
    "Bfloat16": torch.bfloat16,
    "Half": torch.float16,
    "Fp8": torch.float8_e4m3fn,
    "Int8": torch.int8,
}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
RAW = {1: torch.uint8, 2: torch.int16}


@pytest.fixture
def runtime(compiled: Path, tmp_path: Path) -> EmulatedRuntime:
    (tmp_path / "common.cuh").write_text((SOURCES / "common.cuh").read_text())
    (tmp_path / "conversions.cu").write_text(SOURCE)
    return EmulatedRuntime(compiled, sources=tmp_path)


def convert(runtime: EmulatedRuntime, kernel: str, source: Tensor, out: torch.dtype) -> Tensor:
    target = torch.zeros(source.shape, dtype=RAW.get(out.itemsize, out))
    args: list[np.generic] = [address(source), address(target)]
    runtime.launch("conversions.cu", kernel, (source.numel() // 64,), (64,), args)
    return target.view(out)


@pytest.mark.parametrize("name", TYPES)
def test_every_number_is_read_as_torch_reads_it(name: str, runtime: EmulatedRuntime) -> None:
    dtype = TYPES[name]
    every = torch.arange(1 << 8 * dtype.itemsize).to(RAW[dtype.itemsize]).view(dtype)
    got = convert(runtime, f"decode<{name}>", every, torch.float32)
    torch.testing.assert_close(got, every.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", TYPES)
def test_floats_are_rounded_as_torch_rounds_them(name: str, runtime: EmulatedRuntime) -> None:
    """Those halfway between two numbers of the type, beside these, at random, and the extremes."""
    dtype = TYPES[name]
    every = torch.arange(1 << 8 * dtype.itemsize).to(RAW[dtype.itemsize]).view(dtype).float()
    every = every[every.isfinite()].sort().values
    middles = (every[1:].double() + every[:-1].double()).div(2).float()
    up, down = (middles.nextafter(torch.tensor(to)) for to in (inf, -inf))
    patterns = torch.randint(-(1 << 31), (1 << 31) - 1, (4096,), dtype=torch.int64)
    random = patterns.to(torch.int32).view(torch.float32)
    extremes = torch.tensor([0.0, -0.0, inf, -inf, nan, 1e-45, -1e-45, 3.4e38, 464.0, 464.1, 127.5])
    values = torch.cat([every, middles, up, down, random, extremes])
    if dtype == torch.int8:
        values = values[~values.isnan()]
    values = torch.nn.functional.pad(values, (0, -values.numel() % 64))
    expected = values
    if dtype in LARGEST:
        expected = values.clamp(-LARGEST[dtype], LARGEST[dtype])
    expected = (expected.round() if dtype == torch.int8 else expected).to(dtype)
    got = convert(runtime, f"encode<{name}>", values, dtype)
    wrong = got.view(RAW[dtype.itemsize]) != expected.view(RAW[dtype.itemsize])
    wrong &= ~(got.float().isnan() & expected.float().isnan())
    assert values[wrong].tolist() == []

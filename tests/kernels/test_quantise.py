"""Numbers of one byte: what is written, and what is read of them."""

from __future__ import annotations

import pytest
import torch

from kvstore.kernels import reference
from kvstore.kernels.quantise import LARGEST, UNIT, quantise, widen

DTYPES = (torch.float8_e4m3fn, torch.int8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_is_widened_exactly(dtype: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype)
    numbers = numbers[numbers.float().isfinite()]
    wide = torch.full(numbers.shape, torch.nan)
    widen(numbers, wide)
    assert torch.equal(wide * UNIT[dtype], numbers.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_widened_comes_back(dtype: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype)
    numbers = numbers[numbers.float().abs() <= LARGEST[dtype]]
    scale = torch.tensor(0.4375)
    assert torch.equal(quantise(numbers.float() * scale, scale, dtype).float(), numbers.float())


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_that_the_device_writes(dtype: torch.dtype, wide: torch.dtype) -> None:
    """Halves are rounded to even, and what is too large is cut, as the reference has it."""
    generator = torch.Generator().manual_seed(3)
    scales = torch.rand(2, 1, 2, generator=generator) + 0.5
    pairs = torch.randn(40, 2, 2, 64, generator=generator) * LARGEST[dtype] / 2
    steps = torch.arange(64) / 2  # halves between two numbers of int8, with scales of 1
    pairs[0], scales[0] = steps, 1.0
    pairs = pairs.to(wide)
    kv = torch.zeros((2, 1, 2, 40, 64), dtype=torch.int8).view(dtype)
    reference.write_kv(pairs[:, 0], pairs[:, 1], kv, 0, torch.arange(40), None, scales)
    coded = quantise(pairs.permute(2, 1, 0, 3), scales[:, 0, :, None, None], dtype)
    assert torch.equal(coded.view(torch.int8), kv[:, 0].view(torch.int8))
    assert (kv.float().abs() == LARGEST[dtype]).any()
    assert coded.float()[0, 0, 0, :8].tolist() == (
        [0, 0, 1, 2, 2, 2, 3, 4] if dtype == torch.int8 else [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    )

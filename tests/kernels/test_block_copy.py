"""Copies are bitwise, and touch nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvstore.kernels import reference
from kvstore.kernels.block_copy import copy_in, copy_out

BLOCK_TOKENS = 4
BLOCKS = 6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_kv(dtype: torch.dtype) -> Tensor:
    """Every bit pattern, NaNs among them: a copy must not look at what it copies."""
    bytes_ = torch.randint(0, 256, (3, 2, 2, BLOCKS * BLOCK_TOKENS, 8 * dtype.itemsize))
    return bytes_.to(torch.uint8).view(dtype)


def bits(kv: Tensor) -> Tensor:
    return kv.view(torch.uint8)


def buffers(kv: Tensor, count: int) -> list[memoryview]:
    size = kv.numel() * kv.element_size() // BLOCKS
    return [memoryview(bytearray(size)) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_out_gives_the_canonical_bytes(dtype: torch.dtype) -> None:
    kv = random_kv(dtype)
    blocks = [4, 0, 5]
    views = buffers(kv, len(blocks))
    copy_out(kv, blocks, views, BLOCK_TOKENS)
    assert [bytes(view) for view in views] == reference.copy_out(kv, blocks, BLOCK_TOKENS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_undoes_out_and_touches_no_other_block(dtype: torch.dtype) -> None:
    kv, other = random_kv(dtype), random_kv(dtype)
    sources, targets = [4, 0, 5], [1, 2, 0]
    views = buffers(kv, len(sources))
    copy_out(kv, sources, views, BLOCK_TOKENS)

    want = other.clone()
    tokens = torch.arange(BLOCK_TOKENS)
    for source, target in zip(sources, targets, strict=True):
        moved = kv[:, :, :, source * BLOCK_TOKENS + tokens]
        bits(want)[:, :, :, target * BLOCK_TOKENS + tokens] = bits(moved)
    copy_in(other, views, targets, BLOCK_TOKENS)
    assert torch.equal(bits(other), bits(want))


def test_as_many_views_as_blocks() -> None:
    kv = random_kv(torch.float32)
    with pytest.raises(ValueError, match="shorter"):
        copy_out(kv, [0, 1], buffers(kv, 1), BLOCK_TOKENS)
    with pytest.raises(ValueError, match="shorter"):
        copy_in(kv, buffers(kv, 1), [0, 1], BLOCK_TOKENS)


@pytest.mark.parametrize("nbytes", [32, 128, 1504, 1536 - 128, 1536 + 128])
def test_a_view_of_another_length_is_refused(nbytes: int) -> None:
    kv = random_kv(torch.float32)
    assert len(buffers(kv, 1)[0]) == 1536
    view = memoryview(bytearray(nbytes))
    with pytest.raises(ValueError, match=r"multiple|reshape"):
        copy_out(kv, [0], [view], BLOCK_TOKENS)
    with pytest.raises(ValueError, match=r"multiple|reshape"):
        copy_in(kv, [view], [0], BLOCK_TOKENS)

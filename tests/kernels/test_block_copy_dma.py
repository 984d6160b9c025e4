"""Copies by DMA are bitwise those of the reference, and the faster way is found by measuring."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from kvstore.connectors.page_views import page_views
from kvstore.errors import LayoutError
from kvstore.kernels import block_copy_reference as reference
from kvstore.kernels.block_copies import BlockCopies
from kvstore.kernels.block_copy_cuda import KernelCopies
from kvstore.kernels.block_copy_dma import DmaCopies, fastest, ways_of
from kvstore.kernels.cuda_module import Runtime, runtime_of
from kvstore.kernels.paged_tensors import paged, runs_of
from tests.kernels.copying import Case, Memory, on_device, random_case

# Pages in which a head's tokens are contiguous and all layers lie at one distance.
ORDERS = ("HLKBND", "LKHBND", "BHLKND", "HBLKND", "LKBHND")


def case_of(seed: int) -> Case:
    case = random_case(seed)
    order = ORDERS[seed % len(ORDERS)]
    layout = dataclasses.replace(case.layout, order=order, strides=None, keys_transposed=False)
    return dataclasses.replace(case, layout=layout)


def bits(tensors: list[Tensor]) -> bytes:
    return b"".join(reference.raw(tensor.cpu()) for tensor in tensors)


@pytest.mark.parametrize("seed", range(60))
def test_out_and_in_are_the_reference_s(seed: int, any_runtime: Runtime) -> None:
    case = case_of(seed)
    tensors, others = case.tensors(), case.tensors(1)
    heads, tokens, dtype = case.heads, case.block_tokens, tensors[0].dtype
    layers = case.layers if seed % 2 else range(case.layout.layers)
    source = page_views(case.layout, on_device(tensors, any_runtime))
    there = on_device(others, any_runtime)
    copy = DmaCopies(source, tokens, runtime=any_runtime)
    nbytes = copy.format.head_bytes * len(heads)
    memory = Memory(any_runtime, on_device=seed % 3 == 0)
    buffers = [memory.buffer(bytes(nbytes)) for _ in case.runs]
    copy.copy_out(case.flat, buffers, heads=heads)

    pages = page_views(case.layout, tensors)
    blocks = [reference.block_of(pages, runs, tokens, dtype, heads) for runs in case.runs]
    assert memory.contents() == blocks

    case.runs[0][0] = -1
    copy = DmaCopies(page_views(case.layout, there), tokens, runtime=any_runtime)
    copy.copy_in(case.flat, buffers, layers=layers, heads=heads)
    memory.settle()
    pages = page_views(case.layout, others)
    for runs, block in zip(case.runs, blocks, strict=True):
        reference.fill(pages, runs, block, tokens, dtype, heads, layers)
    assert bits(there) == bits(others)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("order", ["LBNHKD", "LBHNKD", "LKBHDN"])
def test_pages_whose_tokens_are_apart_are_refused(
    order: str, layers: int, any_runtime: Runtime
) -> None:
    refused(order, layers, any_runtime)


@pytest.mark.parametrize("order", ["KBNHD", "LBHKND", "BHND"])
def test_layers_that_are_not_at_one_distance_are_refused(order: str, any_runtime: Runtime) -> None:
    refused(order, 3, any_runtime)


def refused(order: str, layers: int, any_runtime: Runtime) -> None:
    case = random_case(0)
    layout = dataclasses.replace(
        case.layout, order=order, block_tokens=4, kv_heads=2, heads=None, layers=layers, head_dim=8,
        strides=None, keys_transposed=False,
    )  # fmt: skip
    case = dataclasses.replace(case, layout=layout)
    tensors = [tensor.to(any_runtime.device_type) for tensor in case.tensors()]
    with pytest.raises(LayoutError, match="use the kernel"):
        DmaCopies(page_views(layout, tensors), 4, runtime=any_runtime)


def test_layers_as_far_apart_as_they_may_be(any_runtime: Runtime) -> None:
    """Of a large KV tensor; nearly none of its memory is touched."""
    far = (1 << 31) // 256
    for slots, there_is in ((far - 16, 2), (far, 1)):
        kv = torch.empty(1, 1, 2, slots, 128, dtype=torch.float16, device=any_runtime.device_type)
        kernel = KernelCopies(paged(kv, 16), 16, runtime=any_runtime)
        ways = ways_of(kernel, runtime=any_runtime)
        assert len(ways) == there_is
        source = torch.randn(2, 16, 128).half()
        kv[0, 0, :, -16:] = source
        for way in ways:
            memory = Memory(any_runtime)
            way.copy_out([slots - 16], [memory.buffer(bytes(source.nbytes))])
            assert memory.contents() == [reference.raw(source)]
    with pytest.raises(LayoutError, match="not 2147483648; use the kernel"):
        DmaCopies(kernel.pages, 16, runtime=any_runtime)


@pytest.mark.gpu
@pytest.mark.parametrize("block_tokens", [16, 256])
def test_the_fastest_is_one_of_those_measured_and_leaves_all_bits(block_tokens: int) -> None:
    kv = torch.randint(0, 256, (8, 4, 2, 32 * block_tokens, 128), dtype=torch.uint8).cuda()
    before = kv.clone()
    pages = paged(kv.view(torch.int8), block_tokens)
    ways: list[BlockCopies] = [KernelCopies(pages, block_tokens), DmaCopies(pages, block_tokens)]
    memory = Memory(runtime_of(kv))
    blocks = list(range(0, 32, 2))
    nbytes = KernelCopies(pages, block_tokens).format.head_bytes * 8
    buffers = [memory.buffer(bytes(nbytes)) for _ in blocks]
    best = fastest(ways, runs_of(blocks, block_tokens), buffers)
    assert best.copies in ways
    assert torch.equal(kv, before)
    whole = before.cpu().view(8, 4, 2, 32, block_tokens, 128)
    assert memory.contents() == [reference.raw(whole[:, :, :, block]) for block in blocks]

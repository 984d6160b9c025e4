"""Copies by the kernel are bitwise those of the reference, and touch nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvstore.connectors.page_views import page_views
from kvstore.errors import LayoutError
from kvstore.kernels import block_copy_reference as reference
from kvstore.kernels.block_copy_cuda import KernelCopies
from kvstore.kernels.cuda_module import Runtime
from kvstore.kernels.paged_tensors import PagedTensors, paged, runs_of
from kvstore.layout import Shard
from tests.connectors.pages import slow_block
from tests.kernels.copying import Case, Memory, on_device, random_case

CASES = range(96)


def bits(tensors: list[Tensor]) -> bytes:
    return b"".join(reference.raw(tensor.cpu()) for tensor in tensors)


def copies(
    case: Case, tensors: list[Tensor], runtime: Runtime, dtype: torch.dtype | None = None
) -> tuple[KernelCopies, list[Tensor]]:
    """Copies between the case's pages, which are brought to the runtime's device."""
    there = on_device(tensors, runtime)
    pages = page_views(case.layout, there)
    return KernelCopies(pages, case.block_tokens, dtype=dtype, runtime=runtime, ctas=3), there


@pytest.mark.parametrize("seed", CASES)
def test_out_gives_the_canonical_bytes(seed: int, any_runtime: Runtime) -> None:
    case = random_case(seed)
    tensors = case.tensors()
    copy, there = copies(case, tensors, any_runtime)
    heads = case.heads
    nbytes = copy.format.head_bytes * len(heads)
    memory = Memory(any_runtime, on_device=seed % 2 == 0)
    copy.copy_out(case.flat, [memory.buffer(bytes(nbytes)) for _ in case.runs], heads=heads)

    pages, dtype = page_views(case.layout, tensors), tensors[0].dtype
    expected = [
        reference.block_of(pages, runs, case.block_tokens, dtype, heads) for runs in case.runs
    ]
    assert memory.contents() == expected
    assert bits(there) == bits(tensors)


@pytest.mark.parametrize("seed", CASES)
def test_in_writes_the_wanted_tokens_layers_and_heads_alone(
    seed: int, any_runtime: Runtime
) -> None:
    case = random_case(seed)
    source, dtype = page_views(case.layout, case.tensors(1)), case.tensors()[0].dtype
    blocks = [
        reference.block_of(source, runs, case.block_tokens, dtype, case.heads) for runs in case.runs
    ]
    case.runs[0][0] = -1
    tensors = case.tensors()
    copy, there = copies(case, tensors, any_runtime)
    memory = Memory(any_runtime, on_device=seed % 2 == 0)
    buffers = [memory.buffer(block) for block in blocks]
    copy.copy_in(case.flat, buffers, layers=case.layers, heads=case.heads)

    pages = page_views(case.layout, tensors)
    for runs, block in zip(case.runs, blocks, strict=True):
        reference.fill(pages, runs, block, case.block_tokens, dtype, case.heads, case.layers)
    assert memory.contents() == blocks
    assert bits(there) == bits(tensors)


@pytest.mark.parametrize("seed", CASES[::4])
def test_the_reference_is_right(seed: int) -> None:
    case = random_case(seed)
    tensors = case.tensors()
    pages, start = page_views(case.layout, tensors), case.layout.held.start
    shard = Shard(start + case.heads.start, len(case.heads))
    slots = case.sequence()
    tokens = case.layout.block_tokens
    for number, runs in enumerate(case.runs):
        # A sequence whose page is, for every token in turn, the one that holds it.
        block = b"".join(
            slow_block(
                case.layout,
                tensors,
                [slot // tokens],
                range(slot % tokens, slot % tokens + 1),
                shard,
            )
            for slot in slots[number * case.block_tokens : (number + 1) * case.block_tokens]
        )
        got = reference.block_of(pages, runs, case.block_tokens, tensors[0].dtype, case.heads)
        # Token by token on the one side, head by head on the other.
        width = tensors[0].itemsize * case.layout.head_dim
        want = torch.frombuffer(bytearray(block), dtype=torch.uint8)
        want = want.view(case.block_tokens, len(case.heads), case.layout.layers, 2, width)
        assert got == reference.raw(want.permute(1, 2, 3, 0, 4))


def test_keys_whose_elements_are_apart_while_values_are_dense(any_runtime: Runtime) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randint(0, 256, (2, 4, 2, 16, 32), generator=generator).to(torch.uint8)
    here = [keys[..., ::2], values[..., :16].as_strided((4, 2, 16, 16), (1024, 512, 32, 1))]
    there = on_device([keys, values], any_runtime)
    views = (there[0][..., ::2], there[1].as_strided((4, 2, 16, 16), (1024, 512, 32, 1)))
    memory = Memory(any_runtime)
    copy = KernelCopies(PagedTensors(views), 16, runtime=any_runtime)
    copy.copy_out([32], [memory.buffer(bytes(2 * copy.format.head_bytes))])
    expected = reference.block_of(PagedTensors((*here,)), [32], 16, torch.uint8, range(2))
    assert memory.contents() == [expected]


WIDE = (torch.float32, torch.bfloat16, torch.float16)
NARROW = (torch.int8, torch.float8_e4m3fn)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Of all magnitudes that KV has, and a piece that is zero."""
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(shape, generator=generator)
    kv *= torch.exp(3 * torch.randn((*shape[:3], 1, 1), generator=generator))
    kv[0, 0, 0] = 0
    return kv.to(dtype)


@pytest.mark.parametrize("head_dim", [3, 80, 128])
@pytest.mark.parametrize("stored", [*WIDE, *NARROW], ids=str)
@pytest.mark.parametrize("own", WIDE, ids=str)
def test_conversion_out_and_in(
    own: torch.dtype, stored: torch.dtype, head_dim: int, runtime: Runtime
) -> None:
    block_tokens = 32 if head_dim == 128 else 4  # a piece for all threads, or for a few
    blocks, layers = [3, 0, 5], range(1, 3)
    kv = numbers((2, 3, 2, 6 * block_tokens, head_dim), own)
    (there,) = on_device([kv], runtime)
    pages, everything = paged(kv, block_tokens), range(2)
    pages_there = paged(there, block_tokens)
    copy = KernelCopies(pages_there, block_tokens, dtype=stored, runtime=runtime, ctas=5)
    memory = Memory(runtime)
    buffers = [memory.buffer(bytes(2 * copy.format.head_bytes)) for _ in blocks]
    runs = runs_of(blocks, block_tokens)
    copy.copy_out(runs, buffers)
    expected = [reference.block_of(pages, [run], block_tokens, stored, everything) for run in runs]
    assert memory.contents() == expected

    targets = runs_of([1, 2, 4], block_tokens)
    copy.copy_in(targets, buffers, layers=layers)
    for run, block in zip(targets, expected, strict=True):
        reference.fill(pages, [run], block, block_tokens, stored, everything, layers)
    memory.settle()
    assert bits([there]) == bits([kv])


def one_piece(values: Tensor, block_tokens: int) -> PagedTensors:
    """Pages of one block whose K and V both are these values."""
    return paged(values.view(1, 1, 1, block_tokens, -1).repeat(1, 1, 2, 1, 1), block_tokens)


def all_numbers(dtype: torch.dtype) -> Tensor:
    """Every number of a type of 16 bits, and none that is not one."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    return torch.where(every.isfinite(), every, torch.zeros(()).to(dtype))


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_becomes_what_torch_makes_of_it(
    own: torch.dtype, stored: torch.dtype, any_runtime: Runtime
) -> None:
    pages = one_piece(all_numbers(own).to(any_runtime.device_type), 128)
    copy = KernelCopies(pages, 128, dtype=stored, runtime=any_runtime)
    memory = Memory(any_runtime)
    copy.copy_out([0], [memory.buffer(bytes(copy.format.head_bytes))])
    assert memory.contents() == [2 * reference.raw(all_numbers(own).to(stored))]


@pytest.mark.parametrize("stored", NARROW, ids=str)
def test_every_number_of_8_bits_is_read_as_torch_reads_it(
    stored: torch.dtype, any_runtime: Runtime
) -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(stored)
    every = torch.where(every.float().isfinite(), every.view(torch.uint8), 0).view(stored)
    pages = one_piece(torch.zeros(256).to(any_runtime.device_type), 16)
    copy = KernelCopies(pages, 16, dtype=stored, runtime=any_runtime)
    scales = reference.raw(torch.tensor([1.0, 0.5]))
    memory = Memory(any_runtime)
    copy.copy_in([0], [memory.buffer(2 * reference.raw(every) + scales)])
    memory.settle()
    keys, values = (view.cpu().flatten() for view in pages.views)
    assert torch.equal(keys, every.float())
    assert torch.equal(values, every.float() / 2)


def test_numbers_between_two_of_fp8_are_rounded_as_torch_rounds_them(runtime: Runtime) -> None:
    """With 448 in the piece the scale is one, so that each is rounded as it is."""
    coded = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (coded[:-1] + coded[1:]) / 2
    near = torch.cat([middles.nextafter(coded[:-1]), middles, middles.nextafter(coded[1:])])
    values = torch.cat([coded, near, -near, torch.tensor([448.0, -448.0, 1e-30])])
    values = torch.nn.functional.pad(values, (0, 1024 - values.numel()))
    pages = one_piece(values.to(runtime.device_type), 16)
    copy = KernelCopies(pages, 16, dtype=torch.float8_e4m3fn, runtime=runtime)
    memory = Memory(runtime)
    copy.copy_out([0], [memory.buffer(bytes(copy.format.head_bytes))])
    (block,) = memory.contents()
    assert block[:1024] == reference.raw(values.to(torch.float8_e4m3fn))
    assert block[2048:] == reference.raw(torch.ones(2))


@pytest.mark.parametrize(
    ("page_tokens", "block_tokens"),
    [(16, 16), (32, 32), (64, 64), (128, 128), (256, 256), (16, 32), (1, 64)],
)
def test_many_blocks(page_tokens: int, block_tokens: int, any_runtime: Runtime) -> None:
    """More than one launch takes, there and back; pages of a block follow one another."""
    blocks, count = 300, 270
    generator = torch.Generator().manual_seed(block_tokens)
    kv = torch.randint(
        -(1 << 15), 1 << 15, (1, 1, 2, blocks * block_tokens, 8), generator=generator
    )
    kv = kv.to(torch.int16).view(torch.bfloat16)
    (there,) = on_device([kv], any_runtime)
    chosen = torch.randperm(blocks, generator=generator)[:count].tolist()
    runs = [
        first + token
        for first in runs_of(chosen, block_tokens)
        for token in range(0, block_tokens, page_tokens)
    ]
    copy = KernelCopies(paged(there, page_tokens), block_tokens, runtime=any_runtime)
    memory = Memory(any_runtime)
    buffers = [memory.buffer(bytes(copy.format.head_bytes)) for _ in chosen]
    copy.copy_out(runs, buffers)
    pieces = kv.view(2, blocks, block_tokens * 8)
    assert memory.contents() == [reference.raw(pieces[:, block]) for block in chosen]

    there.zero_()
    copy.copy_in(runs, buffers)
    memory.settle()
    expected = torch.zeros_like(pieces)
    expected[:, chosen] = pieces[:, chosen]
    assert bits([there]) == bits([expected])


BLOCK = 4


@pytest.fixture
def small(any_runtime: Runtime) -> KernelCopies:
    """Six blocks of 4 tokens, 2 heads, 3 layers."""
    kv = torch.zeros(2, 3, 2, 6 * BLOCK, 8, dtype=torch.bfloat16, device=any_runtime.device_type)
    return KernelCopies(paged(kv, BLOCK), BLOCK, runtime=any_runtime)


def good(copy: KernelCopies, count: int = 1) -> list[memoryview]:
    return [memoryview(bytearray(2 * copy.format.head_bytes)) for _ in range(count)]


@pytest.mark.parametrize(
    ("runs", "count", "message"),
    [
        ([24], 1, "do not lie within 6 pages"),
        ([-1], 1, "do not lie within"),
        ([2], 1, "do not lie within"),
        ([0, 4, 8], 2, "3 runs for 2 blocks"),
        ([0, 4, 8], 1, "3 runs for 1 blocks"),
        ([], 1, "0 runs for 1 blocks"),
    ],
)
def test_runs_that_are_none_are_refused(
    small: KernelCopies, runs: list[int], count: int, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        small.copy_out(runs, good(small, count))


def test_parts_that_there_are_not_are_refused(small: KernelCopies) -> None:
    for part in (range(0, 4), range(-1, 1), range(1, 1), range(0, 3, 2)):
        with pytest.raises(LayoutError, match="layers range"):
            small.copy_in([0], good(small), layers=part)
    with pytest.raises(LayoutError, match="heads range"):
        small.copy_in([0], good(small), heads=range(0, 3))


def test_buffers_that_cannot_be_used_are_refused(small: KernelCopies) -> None:
    nbytes = 2 * small.format.head_bytes
    whole = memoryview(bytearray(2 * nbytes + 2))
    spread = torch.zeros(nbytes, 2, dtype=torch.uint8, device=small.pages.views[0].device)[:, 0]
    elsewhere = torch.zeros(nbytes, dtype=torch.uint8, device="meta")
    refused: list[memoryview | Tensor] = [
        whole[: nbytes - 1],
        whole[: nbytes + 1],
        whole[: 2 * nbytes : 2],
        spread,
        elsewhere,
    ]
    for buffer in refused:
        with pytest.raises(LayoutError, match=f"is not {nbytes} contiguous bytes"):
            small.copy_in([0], [buffer])
    with pytest.raises(LayoutError, match="can write"):
        small.copy_out([0], [memoryview(bytes(nbytes))])
    with pytest.raises(LayoutError, match="multiples of 4 bytes"):
        small.copy_in([0], [whole[2 : nbytes + 2]])


def test_nothing_to_copy(small: KernelCopies) -> None:
    small.copy_out([], [])
    small.copy_in([], [])


@pytest.mark.parametrize(
    ("own", "stored", "tokens"),
    [
        (torch.int8, torch.bfloat16, 4),
        (torch.float8_e4m3fn, torch.int8, 4),
        (torch.float32, torch.float64, 4),
        (torch.float32, torch.uint8, 4),
        (torch.float32, torch.float32, 257),
        (torch.float32, torch.float32, 0),
    ],
    ids=str,
)
def test_formats_that_there_are_not_are_refused(
    own: torch.dtype, stored: torch.dtype, tokens: int, any_runtime: Runtime
) -> None:
    kv = torch.zeros(1, 1, 2, 514, 8, device=any_runtime.device_type).to(own)
    with pytest.raises(LayoutError):
        KernelCopies(paged(kv, 257), tokens, dtype=stored, runtime=any_runtime)


def test_pages_that_do_not_go_together_are_refused() -> None:
    page = torch.zeros(4, 2, 4, 8)
    for others in (
        (),
        (page, page),
        (torch.zeros(4, 2, 4, 9),),
        (torch.zeros(4, 2, 8, 4).transpose(2, 3),) * 3,
        (torch.zeros(8, 2, 4, 8)[::2],),
        (torch.zeros(4, 2, 4, 8, dtype=torch.int32),),
        (torch.zeros(4, 2, 4, 8, device="meta"),),
    ):
        with pytest.raises(LayoutError):
            PagedTensors((page, *others))
    PagedTensors((page, torch.zeros(4, 2, 8, 4).transpose(2, 3)))
    with pytest.raises(LayoutError, match="whole blocks of 3 slots"):
        paged(torch.zeros(1, 1, 2, 16, 8), 3)

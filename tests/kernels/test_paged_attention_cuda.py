"""Decode attention of the CUDA kernels: right, whole, and the same bits in any company."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kvstore.errors import KernelError
from kvstore.kernels import reference
from kvstore.kernels.cuda_module import CudaRuntime, Runtime
from kvstore.kernels.paged_attention_cuda import (
    HEAD_DIMS,
    KV_DTYPES,
    DecodeWorkspace,
    can_decode,
    decode,
)
from tests.kernels.emulator import EmulatedRuntime

LAYERS, LAYER = 2, 1
NAN = float("nan")
# One token; ends of tiles, and of the tiles of four warps; more tiles than a ring has; padding.
LENGTHS = (1, 15, 16, 17, 0, 63, 65, 300, 0)
# Error of a head's result in float32, as a part of its length: far less than what leaving the
# cut off part of weights or queries away would make, more than one order of additions differs
# from another by.
EXACT = 1e-4


@dataclass
class Case:
    """Random sequences in scattered blocks; what is not theirs is NaN, or as large as can be."""

    query: Tensor
    kv: Tensor
    block_tables: Tensor
    context_lens: Tensor
    block_tokens: int
    scales: Tensor | None

    def run(self, runtime: Runtime, blocks: int | None = 3) -> Tensor:
        """All memory to be written is NaN before."""
        batch, heads, head_dim = self.query.shape
        workspace = DecodeWorkspace(batch, heads, head_dim, self.query.device, blocks)
        workspace.memory.fill_(NAN)
        out = torch.full_like(self.query, NAN, memory_format=torch.contiguous_format)
        decode(
            self.query,
            self.kv,
            LAYER,
            self.block_tables,
            self.context_lens,
            self.block_tokens,
            out,
            workspace,
            self.scales,
            runtime,
        )
        return out

    def expected(self) -> Tensor:
        return reference.decode(
            self.query,
            self.kv,
            LAYER,
            self.block_tables,
            self.context_lens,
            self.block_tokens,
            self.scales,
        )

    def rows(self, *rows: int) -> Case:
        chosen = list(rows)
        return replace(
            self,
            query=self.query[chosen],
            block_tables=self.block_tables[chosen],
            context_lens=self.context_lens[chosen],
        )


def a_case(
    device: str,
    lengths: Sequence[int] = LENGTHS,
    *,
    dtype: torch.dtype = torch.bfloat16,
    query_dtype: torch.dtype = torch.float32,
    head_dim: int = 128,
    kv_heads: int = 2,
    group: int = 4,
    block_tokens: int = 16,
    spread: float = 1.0,
) -> Case:
    needed = [-(-length // block_tokens) for length in lengths]
    blocks = sum(needed) + 2
    order = torch.randperm(blocks, device=device)
    nobodys = int(order[-1])
    tables = torch.full((len(lengths), max(needed) + 1), nobodys, dtype=torch.int32, device=device)
    first = 0
    for row, count in enumerate(needed):
        tables[row, :count] = order[first : first + count]
        first += count
    used = torch.zeros(blocks, block_tokens, dtype=torch.bool, device=device)
    for row, length in enumerate(lengths):
        for number in range(needed[row]):
            used[tables[row, number], : length - number * block_tokens] = True
    shape = (kv_heads, LAYERS, 2, blocks * block_tokens, head_dim)
    kv = torch.randn(shape, device=device)
    scales = None
    if dtype.itemsize == 1:
        scales = torch.rand(kv_heads, LAYERS, 2, device=device) * 0.02 + 0.01
        kv = (kv * 40).clamp(-127, 127)
    outside = 127.0 if dtype == torch.int8 else NAN
    kv[:, :, :, ~used.flatten()] = outside
    kv[:, 1 - LAYER] = outside
    query = torch.randn(len(lengths), kv_heads * group, head_dim, device=device) * spread
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Case(query.to(query_dtype), kv.to(dtype), tables, lens, block_tokens, scales)


def worst_error(out: Tensor, expected: Tensor) -> float:
    """The largest of all heads; NaN if there is one anywhere."""
    error = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    return float(error.max())


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        # Two bytes an element and one are laid out differently; types of a size are not.
        *((torch.bfloat16, head_dim) for head_dim in HEAD_DIMS),
        *((torch.float8_e4m3fn, head_dim) for head_dim in HEAD_DIMS),
        (torch.float16, 80),
        (torch.int8, 96),
    ],
)
def test_as_the_reference(dtype: torch.dtype, head_dim: int, runtime: Runtime) -> None:
    case = a_case(runtime.device_type, dtype=dtype, head_dim=head_dim)
    out = case.run(runtime)
    assert worst_error(out, case.expected()) < EXACT
    assert not out[case.context_lens == 0].any()


@pytest.mark.parametrize(
    ("dtype", "query_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float8_e4m3fn, torch.bfloat16),
    ],
)
def test_queries_of_16_bits(dtype: torch.dtype, query_dtype: torch.dtype, runtime: Runtime) -> None:
    case = a_case(runtime.device_type, dtype=dtype, query_dtype=query_dtype)
    out, expected = case.run(runtime).double(), case.expected()
    # All together are no further off than rounding alone makes them,
    rounded = expected.to(query_dtype).double()
    allowed = (rounded - expected).norm() + EXACT * expected.norm()
    assert (out - expected).norm() < allowed
    # and no element is than its own rounding.
    half_a_step = torch.finfo(query_dtype).eps / 2
    torch.testing.assert_close(out, expected, rtol=half_a_step, atol=EXACT)


@pytest.mark.parametrize(("kv_heads", "group"), [(3, 1), (5, 3), (1, 8), (2, 12), (1, 32)])
def test_any_number_of_heads_shares_keys(kv_heads: int, group: int, runtime: Runtime) -> None:
    case = a_case(runtime.device_type, (40, 520), kv_heads=kv_heads, group=group, head_dim=64)
    assert worst_error(case.run(runtime), case.expected()) < EXACT


@pytest.mark.parametrize("block_tokens", [16, 32, 48, 128, 256])
def test_blocks_of_any_size(block_tokens: int, runtime: Runtime) -> None:
    case = a_case(runtime.device_type, (1, 100, 700), block_tokens=block_tokens, head_dim=64)
    assert worst_error(case.run(runtime), case.expected()) < EXACT


@pytest.mark.parametrize("lengths", [(511, 512, 513, 1025), (3, 16_385), (65_537,)])
def test_contexts_of_many_chunks(lengths: tuple[int, ...], emulated: EmulatedRuntime) -> None:
    case = a_case("cpu", lengths, kv_heads=1, group=2, head_dim=64)
    assert worst_error(case.run(emulated, blocks=7), case.expected()) < EXACT


@pytest.mark.parametrize(("spread", "error"), [(0.0, EXACT), (30.0, 10 * EXACT)])
def test_weights_all_alike_and_weights_of_a_few(
    spread: float, error: float, runtime: Runtime
) -> None:
    """Scores of hundreds: the largest is taken off before they are exponents."""
    case = a_case(runtime.device_type, spread=spread)
    assert worst_error(case.run(runtime), case.expected()) < error


def test_queries_that_are_parts_of_rows(runtime: Runtime) -> None:
    case = a_case(runtime.device_type, head_dim=64)
    rows = torch.cat([case.query, torch.full_like(case.query, NAN)], 1)
    part = replace(case, query=rows[:, : case.query.shape[1]])
    assert torch.equal(part.run(runtime), case.run(runtime))


def test_the_same_bits_in_any_company_and_on_any_grid(runtime: Runtime) -> None:
    case = a_case(runtime.device_type, (513, 1, 1100, 40, 0, 512), group=2, head_dim=64)
    together = case.run(runtime, blocks=1)
    for blocks in (2, 64):
        assert torch.equal(case.run(runtime, blocks=blocks), together)
    for row in range(len(together)):
        assert torch.equal(case.rows(row).run(runtime), together[[row]])
    assert torch.equal(case.rows(2, 5, 0).run(runtime), together[[2, 5, 0]])


def test_the_same_bits_wherever_the_blocks_lie(runtime: Runtime) -> None:
    case = a_case(runtime.device_type, (700, 90))
    slots = case.kv.shape[3]
    blocks = slots // case.block_tokens
    order = torch.randperm(blocks, device=case.kv.device)  # block b goes to order[b]
    pieces = case.kv.view(*case.kv.shape[:3], blocks, case.block_tokens, -1)
    moved = torch.empty_like(pieces)
    moved[:, :, :, order] = pieces
    other = replace(
        case,
        kv=moved.view(case.kv.shape),
        block_tables=order[case.block_tables.long()].to(torch.int32),
    )
    assert torch.equal(other.run(runtime), case.run(runtime))


def test_a_larger_workspace_serves_smaller_batches(runtime: Runtime) -> None:
    case = a_case(runtime.device_type, (600, 20))
    workspace = DecodeWorkspace(9, 32, 256, case.kv.device, 4)
    workspace.memory.fill_(NAN)
    out = torch.full_like(case.query, NAN)
    arguments = (case.query, case.kv, LAYER, case.block_tables, case.context_lens, 16, out)
    decode(*arguments, workspace, runtime=runtime)
    assert torch.equal(out, case.run(runtime))


def test_as_many_blocks_share_the_work_as_the_device_runs_at_once(compiled: Path) -> None:
    class Small(EmulatedRuntime):
        """Says how many of what fit, and notes what is launched."""

        def resident_blocks(self, source: str, kernel: str, threads: int, shared_bytes: int) -> int:
            self.asked = kernel, threads, shared_bytes
            return 5

        def launch(
            self,
            source: str,
            kernel: str,
            grid: tuple[int, ...],
            block: tuple[int, ...],
            args: Sequence[np.generic],
            shared_bytes: int = 0,
        ) -> None:
            if shared_bytes:
                assert (kernel, *block, shared_bytes) == self.asked
                self.grid = grid
            super().launch(source, kernel, grid, block, args, shared_bytes)

    runtime = Small(compiled)
    case = a_case("cpu", (600, 20), head_dim=64)
    out = case.run(runtime, blocks=None)
    assert runtime.grid == (5,)
    assert torch.equal(out, case.run(runtime, blocks=2))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_blocks_fill_the_device(head_dim: int) -> None:
    """One or two more a multiprocessor would wait until others are through with all they have."""
    case = a_case("cuda", (600, 20), head_dim=head_dim)
    runtime = CudaRuntime()
    assert torch.equal(case.run(runtime, blocks=None), case.run(runtime, blocks=2))
    ((_, blocks),) = runtime._resident.items()
    each, rest = divmod(blocks, torch.cuda.get_device_properties(0).multi_processor_count)
    assert not rest
    assert 1 <= each <= 16


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)])
def test_batches_of_nothing(lengths: tuple[int, ...], runtime: Runtime) -> None:
    case = a_case(runtime.device_type, (20,))
    rows = len(lengths)
    nothing = replace(
        case,
        query=case.query[:1].repeat(rows, 1, 1),
        block_tables=case.block_tables[:1].repeat(rows, 1),
        context_lens=torch.zeros(rows, dtype=torch.int32, device=case.kv.device),
    )
    assert torch.equal(nothing.run(runtime), torch.zeros_like(nothing.query))


def test_a_batch_of_hundreds(runtime: Runtime) -> None:
    """More sequences than threads, and than lanes several times over."""
    lengths = [(17 * row) % 31 for row in range(200)]
    case = a_case(runtime.device_type, lengths, kv_heads=1, group=1, head_dim=64)
    assert worst_error(case.run(runtime), case.expected()) < EXACT


def test_what_does_not_fit_is_refused(emulated: EmulatedRuntime) -> None:
    case = a_case("cpu", (20, 30), head_dim=64)
    workspace = DecodeWorkspace(2, 8, 64, "cpu")
    scales = torch.ones(2, LAYERS, 2)

    def refused(match: str, **changed: object) -> None:
        arguments = {
            "query": case.query,
            "kv": case.kv,
            "layer": LAYER,
            "block_tables": case.block_tables,
            "context_lens": case.context_lens,
            "block_tokens": 16,
            "out": torch.empty_like(case.query),
            "workspace": workspace,
            **changed,
        }
        with pytest.raises(KernelError, match=match):
            decode(**arguments, runtime=emulated)  # type: ignore[arg-type]

    refused("query is .* with heads that share 2", query=case.query[0])
    refused("query is .* with heads that share 2", query=case.query[:, :7])
    refused("72 elements", kv=case.kv.new_empty(2, 2, 2, 16, 72))
    refused("query is .* not .*128", kv=case.kv.new_empty(2, 2, 2, 16, 128))
    refused("query is float64", query=case.query.double())
    refused("query .* densely", query=case.query.transpose(1, 2).contiguous().transpose(1, 2))
    refused("query has rows", query=torch.zeros(case.query.numel() + 1)[1:].view(case.query.shape))
    refused("no layer 2 of 2", layer=2)
    refused("kv is .* on cpu", kv=case.kv[0])
    refused("kv is float32", kv=case.kv.float())
    refused("kv .* densely", kv=case.kv[:, :, :, :16])
    refused("blocks of 24", block_tokens=24)
    refused("blocks of 256", block_tokens=256)
    refused("block_tables is int64", block_tables=case.block_tables.long())
    refused("block_tables is", block_tables=case.block_tables[:1])
    refused("block_tables is", block_tables=case.block_tables[0])
    refused("block_tables .* densely", block_tables=case.block_tables.T.contiguous().T)
    refused("context_lens is", context_lens=case.context_lens[:1])
    refused("out is bfloat16", out=case.query.bfloat16())
    refused("out .* densely", out=torch.empty(2, 16, 64)[:, ::2])
    refused("with scales", scales=scales)
    refused("without scales", kv=case.kv.to(torch.int8))
    refused("scales is", kv=case.kv.to(torch.int8), scales=scales[..., :1])
    refused("too small for 2 sequences", workspace=DecodeWorkspace(1, 8, 64, "cpu"))


def test_shared_memory_that_a_device_does_not_have(compiled: Path) -> None:
    """On sm_86 and sm_89 a block can have 99 KiB: too little for heads of 256 in 16 bits."""
    runtime = EmulatedRuntime(compiled)
    case = a_case("cpu", (20, 30), head_dim=256)
    assert can_decode(256, torch.bfloat16, 16, 2, runtime)
    runtime.block_shared_bytes = 99 << 10
    assert can_decode(128, torch.bfloat16, 16, 2, runtime)
    assert can_decode(256, torch.int8, 16, 2, runtime)
    assert not can_decode(128, torch.bfloat16, 16, 10_000, runtime)
    assert not can_decode(256, torch.bfloat16, 16, 2, runtime)
    with pytest.raises(KernelError, match=r"take 135176 bytes .*; the device has 101376"):
        case.run(runtime)


def test_tensors_on_a_cpu_need_another_runtime() -> None:
    case = a_case("cpu", (20,), head_dim=64)
    workspace = DecodeWorkspace(1, 8, 64, "cpu")
    out = torch.empty_like(case.query)
    with pytest.raises(KernelError, match="not on cpu"):
        decode(case.query, case.kv, LAYER, case.block_tables, case.context_lens, 16, out, workspace)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(131_072,), (32_768, 1, 131_071, 5_000, 0, 70_000)])
def test_contexts_up_to_128_ki(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    case = a_case("cuda", lengths, dtype=dtype)
    assert worst_error(case.run(CudaRuntime(), blocks=None), case.expected()) < EXACT


@pytest.mark.gpu
def test_replayed_by_a_cuda_graph_with_other_lengths() -> None:
    case = a_case("cuda", (3000, 40, 600, 1))
    workspace = DecodeWorkspace(4, 8, 128, "cuda")
    out = torch.full_like(case.query, NAN)
    arguments = (case.query, case.kv, LAYER, case.block_tables, case.context_lens, 16, out)
    decode(*arguments, workspace, runtime=CudaRuntime())  # compiled and loaded before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(*arguments, workspace, runtime=CudaRuntime())
    for lengths in ((3000, 40, 600, 1), (1, 0, 513, 0), (0, 33, 2, 1)):
        case.context_lens.copy_(torch.tensor(lengths))
        out.fill_(NAN)
        graph.replay()
        assert worst_error(out, case.expected()) < EXACT

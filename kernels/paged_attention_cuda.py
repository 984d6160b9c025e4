"""Attention of decoding sequences to paged KV, on a CUDA device.

The kernels are csrc/paged_attention.cu; docs/adr/0051-paged-attention.md has the reasons.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvstore.errors import KernelError
from kvstore.kernels.cuda_module import Runtime, address, runtime_of
from kvstore.kernels.cuda_tensors import HEAD_DIMS as HEAD_DIMS
from kvstore.kernels.cuda_tensors import (
    check,
    check_aligned,
    check_kv,
    check_scales,
    element_name,
)

SOURCE = "paged_attention.cu"
KV_DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)
INT32 = (torch.int32,)
FLOAT32 = (torch.float32,)
QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The constants of the same names in csrc.
WARPS = 4
TILE = 16
HEADS = 8
MAX_CHUNKS = 32
MIN_AHEAD_BYTES = 6144


class DecodeWorkspace:
    """Device memory for the parts of results, and the grid that fills them.

    One serves all layers, and every batch up to `batch`: kernels of one stream use it in
    turn. A CUDA graph that was captured with it needs it to live. `blocks` is how many thread
    blocks share the work (None: as many as the device runs at once); it changes no bit.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        device: torch.device | str,
        blocks: int | None = None,
    ) -> None:
        floats = batch * heads * MAX_CHUNKS * (head_dim + 2)
        self.memory = torch.empty(floats, dtype=torch.float32, device=device)
        self.blocks = blocks


def can_decode(
    head_dim: int, dtype: torch.dtype, block_tokens: int, batch: int, runtime: Runtime
) -> bool:
    """Whether `decode` takes such KV, of up to `batch` sequences, on that device."""
    return (
        head_dim in HEAD_DIMS
        and dtype in KV_DTYPES
        and block_tokens % TILE == 0
        and _shared_bytes(head_dim, dtype, batch) <= runtime.block_shared_bytes
    )


def decode(
    query: Tensor,
    kv: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    block_tokens: int,
    out: Tensor,
    workspace: DecodeWorkspace,
    scales: Tensor | None = None,
    runtime: Runtime | None = None,
) -> None:
    """Attend with one query token a sequence to the first `context_lens[b]` tokens of it.

    - `query` [B, heads, head_dim] bf16, fp16 or fp32; the last two dimensions are dense. Heads
      that share a KV head follow one another. Numbers are below 65504, unless KV is bf16.
    - `kv` [kv_heads, layers, 2, slots, head_dim] bf16, fp16, fp8 (e4m3) or int8, dense. The
      token itself is among those attended to, so its K and V are written before.
    - `block_tables` int32 [B, max_blocks], of blocks of `block_tokens` tokens (a multiple of
      16); entries behind a sequence's last block are not read.
    - `context_lens` int32 [B]. A row of 0 pads the batch: its result is zeros.
    - `out` [B, heads, head_dim], dense, dtype of `query`: every element is written.
    - `scales` float32 [kv_heads, layers, 2]: what K and V of fp8 and int8 are multiplied by.

    Lengths and tables are read on the device alone, so the call can be captured in a CUDA
    graph. Runs on torch's current stream and does not block. The bits of a sequence's result
    depend on no other sequence and not on where its blocks lie. Raises KernelError for tensors
    that do not fit, before anything is launched.
    """
    runtime = runtime or runtime_of(kv)
    check_kv(kv, layer, KV_DTYPES, runtime)
    check_scales(scales, kv)
    if block_tokens < 1 or block_tokens % TILE or kv.shape[3] % block_tokens:
        raise KernelError(
            f"blocks of {block_tokens} tokens in {kv.shape[3]} slots: they must be a multiple of "
            f"{TILE} and divide the slots"
        )
    _check_batch(query, kv, block_tables, context_lens, out, workspace)
    if not can_decode(kv.shape[4], kv.dtype, block_tokens, len(query), runtime):
        raise KernelError(
            f"{len(query)} sequences with heads of {kv.shape[4]} elements of {kv.dtype} take "
            f"{_shared_bytes(kv.shape[4], kv.dtype, len(query))} bytes of shared memory; "
            f"the device has {runtime.block_shared_bytes}"
        )
    if len(query) == 0:
        return
    _start_chunks(
        runtime, query, kv, layer, block_tables, context_lens, block_tokens, out, workspace, scales
    )
    _start_sums(runtime, context_lens, out, workspace)


def _start_chunks(
    runtime: Runtime,
    query: Tensor,
    kv: Tensor,
    layer: int,
    block_tables: Tensor,
    context_lens: Tensor,
    block_tokens: int,
    out: Tensor,
    workspace: DecodeWorkspace,
    scales: Tensor | None,
) -> None:
    batch, heads, head_dim = query.shape
    kv_heads, layers, _, slots, _ = kv.shape
    kernel = f"paged_attention<{element_name(kv)}, {element_name(query)}, {head_dim}>"
    threads = 32 * WARPS
    shared_bytes = _shared_bytes(head_dim, kv.dtype, batch)
    blocks = workspace.blocks or runtime.resident_blocks(SOURCE, kernel, threads, shared_bytes)
    runtime.launch(
        SOURCE,
        kernel,
        (blocks,),
        (threads,),
        (
            address(query),
            np.int64(query.stride(0)),
            address(kv[:, layer]),
            np.int64(kv.stride(0)),
            np.int64(slots * head_dim),
            address(block_tables),
            np.int32(block_tables.stride(0)),
            address(context_lens),
            address(None if scales is None else scales[:, layer]),
            np.int32(layers * 2),
            address(out),
            address(workspace.memory),
            np.int32(batch),
            np.int32(kv_heads),
            np.int32(heads // kv_heads),
            np.int32(block_tokens),
        ),
        shared_bytes,
    )


def _start_sums(
    runtime: Runtime, context_lens: Tensor, out: Tensor, workspace: DecodeWorkspace
) -> None:
    batch, heads, head_dim = out.shape
    runtime.launch(
        SOURCE,
        f"paged_attention_sum<{element_name(out)}, {head_dim}>",
        (-(-batch * heads // WARPS),),
        (32 * WARPS,),
        (
            address(context_lens),
            address(workspace.memory),
            address(out),
            np.int32(batch),
            np.int32(heads),
        ),
    )


def _check_batch(
    query: Tensor,
    kv: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    out: Tensor,
    workspace: DecodeWorkspace,
) -> None:
    if query.dim() != 3 or query.shape[1] % kv.shape[0]:
        raise KernelError(
            f"query is {list(query.shape)}, not [B, heads, head_dim] with heads that share "
            f"{kv.shape[0]} KV heads evenly"
        )
    batch, heads, head_dim = query.shape
    check("query", query, (batch, heads, kv.shape[4]), QUERY_DTYPES, kv.device, 2)
    check_aligned("query", query)
    check("block_tables", block_tables, (batch, *block_tables.shape[1:2]), INT32, kv.device, 1)
    check("context_lens", context_lens, (batch,), INT32, kv.device)
    check("out", out, query.shape, (query.dtype,), kv.device)
    check("workspace", workspace.memory, workspace.memory.shape, FLOAT32, kv.device)
    if batch * heads * MAX_CHUNKS * (head_dim + 2) > workspace.memory.numel():
        raise KernelError(f"the workspace is too small for {batch} sequences of {heads} heads")


def _shared_bytes(head_dim: int, dtype: torch.dtype, batch: int) -> int:
    """For the tiles of all warps, `Ring` in csrc/kv_tiles.cuh, and an int a sequence."""
    row_bytes = head_dim * dtype.itemsize
    pitch = (row_bytes // 16 | 1) * 16
    tiles_ahead = (MIN_AHEAD_BYTES - 1) // (2 * TILE * row_bytes) + 1
    return WARPS * (tiles_ahead + 1) * 2 * TILE * pitch + 4 * batch

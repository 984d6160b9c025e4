"""Attention of decoding sequences to paged KV, on a CUDA device.

The kernels are csrc/paged_attention.cu; docs/adr/0051-paged-attention.md has the reasons.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvstore.errors import KernelError
from kvstore.kernels.cuda_module import Runtime, address, runtime_of
from kvstore.kernels.cuda_tensors import check, check_aligned, element_name

SOURCE = "paged_attention.cu"
HEAD_DIMS = (64, 80, 96, 128, 256)
KV_DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)
INT32 = (torch.int32,)
QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The constants of the same names in csrc.
WARPS = 4
TILE = 16
HEADS = 8
MAX_CHUNKS = 32
MIN_AHEAD_BYTES = 6144
# Blocks that are to run on a multiprocessor at once; kv_tiles.cuh divides shared memory by it.
BLOCKS_PER_SM = 3


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
        self.blocks = blocks or BLOCKS_PER_SM * _multiprocessors(self.memory.device)


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
      that share a KV head follow one another.
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
    _check(query, kv, layer, block_tokens, runtime)
    batch, heads, head_dim = query.shape
    kv_heads, layers, _, slots, _ = kv.shape
    check("block_tables", block_tables, (batch, *block_tables.shape[1:]), INT32, kv.device, 1)
    check("context_lens", context_lens, (batch,), INT32, kv.device)
    check("out", out, query.shape, (query.dtype,), kv.device)
    if scales is not None:
        check("scales", scales, (kv_heads, layers, 2), (torch.float32,), kv.device)
    if (kv.element_size() == 1) != (scales is not None):
        raise KernelError(f"KV of {kv.dtype} with{'out' if scales is None else ''} scales")
    if batch * heads * MAX_CHUNKS * (head_dim + 2) > workspace.memory.numel():
        raise KernelError(f"the workspace is too small for {batch} sequences of {heads} heads")
    if batch == 0:
        return
    keys = kv[:, layer]
    scale = scales[:, layer] if scales is not None else None
    names = element_name(kv), element_name(query), str(head_dim)
    runtime.launch(
        SOURCE,
        f"paged_attention<{', '.join(names)}>",
        (workspace.blocks,),
        (32 * WARPS,),
        (
            address(query),
            np.int64(query.stride(0)),
            address(keys),
            np.int64(kv.stride(0)),
            np.int64(slots * head_dim),
            address(block_tables),
            np.int32(block_tables.stride(0)),
            address(context_lens),
            address(scale),
            np.int32(layers * 2),
            address(out),
            address(workspace.memory),
            np.int32(batch),
            np.int32(kv_heads),
            np.int32(heads // kv_heads),
            np.int32(block_tokens),
        ),
        shared_bytes=_ring_bytes(head_dim * kv.element_size()) + 4 * batch,
    )
    runtime.launch(
        SOURCE,
        f"paged_attention_sum<{', '.join(names[1:])}>",
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


def _check(query: Tensor, kv: Tensor, layer: int, block_tokens: int, runtime: Runtime) -> None:
    if query.dim() != 3 or kv.dim() != 5:
        raise KernelError(f"query and kv have {query.dim()} and {kv.dim()} dimensions, not 3 and 5")
    heads, head_dim = query.shape[1:]
    kv_heads, layers, _, slots, _ = kv.shape
    if kv.device.type != runtime.device_type:
        raise KernelError(f"kv is on {kv.device}, not on a {runtime.device_type} device")
    check("kv", kv, (kv_heads, layers, 2, slots, head_dim), KV_DTYPES, kv.device)
    check_aligned("kv", kv)
    check("query", query, query.shape, QUERY_DTYPES, kv.device, 2)
    check_aligned("query", query)
    if head_dim not in HEAD_DIMS:
        raise KernelError(f"heads of {head_dim} elements; {HEAD_DIMS} are supported")
    if heads % kv_heads:
        raise KernelError(f"{heads} query heads do not share {kv_heads} KV heads evenly")
    if not 0 <= layer < layers:
        raise KernelError(f"there is no layer {layer} of {layers}")
    if block_tokens < 1 or block_tokens % TILE or slots % block_tokens:
        raise KernelError(
            f"blocks of {block_tokens} tokens in {slots} slots: they must be a multiple of "
            f"{TILE} and divide the slots"
        )


def _ring_bytes(row_bytes: int) -> int:
    """Shared memory for the tiles of all warps: `Ring` in csrc/kv_tiles.cuh."""
    pitch = (row_bytes // 16 | 1) * 16
    tiles_ahead = (MIN_AHEAD_BYTES - 1) // (2 * TILE * row_bytes) + 1
    return WARPS * (tiles_ahead + 1) * 2 * TILE * pitch


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count

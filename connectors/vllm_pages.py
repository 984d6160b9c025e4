"""vLLM's KV tensors as pages, once it has been shown that they are what they are taken for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvstore.connectors.convert import Pages
from kvstore.connectors.device_pages import pages_of
from kvstore.connectors.page_layout import PageLayout
from kvstore.errors import LayoutError
from kvstore.identity import Namespace
from kvstore.kernels.block_copies import LIMIT
from kvstore.layout import Shard

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Write = Callable[[str, Tensor, Tensor, Tensor], None]
"""Layer name, K and V [tokens, heads, head_dim], slots int64 [tokens]: as the engine writes."""


# Attention backends by device: what their kernels write is read back before it is believed.
KNOWN = {
    "cpu": ("CPU_ATTN",),
    "cuda": ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION"),
}


def vllm_pages(
    config: VllmConfig, tensors: Mapping[str, Tensor], namespace: Namespace, heads: Shard
) -> Pages:
    """The pages of a worker that holds `heads`. To be called before anything is in them.

    Raises LayoutError, one line, unless what vLLM's own kernel writes is read back bit for bit.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    devices = {tensor.device for tensor in tensors.values()}
    kinds = {device.type for device in devices}
    if len(devices) != 1 or not kinds <= KNOWN.keys():
        raise LayoutError(f"its KV is on {', '.join(sorted(kinds))}; known are CPUs and CUDA")
    (device,) = devices
    layers = config.compilation_config.static_forward_context
    names = sorted(tensors, key=extract_layer_index)
    if [extract_layer_index(name) for name in names] != list(range(namespace.layers)):
        raise LayoutError(f"its KV is of layers {', '.join(names)}")
    for name in names:
        backend, known = layers[name].get_attn_backend().get_name(), KNOWN[device.type]
        if backend not in known:
            raise LayoutError(f"its attention backend is {backend}; known is {', '.join(known)}")
    ordered = [tensors[name] for name in names]

    def write(name: str, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        layer = layers[name]
        layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)

    if device.type == "cpu":
        candidates = [cpu_pages(ordered, namespace, heads, flag) for flag in (True, False)]
    else:
        candidates = [gpu_pages(ordered, namespace, heads)]
    return proven(candidates, names, write, device)


def gpu_pages(tensors: Sequence[Tensor], namespace: Namespace, heads: Shard) -> Pages:
    """Tensors [blocks, heads, tokens, 2 * head_dim], K and V of a token and head side by side.

    The order in memory is another, and whatever their strides say.
    """
    if namespace.block_tokens > LIMIT:
        raise LayoutError(f"on a GPU block_tokens may be {LIMIT}, not {namespace.block_tokens}")
    return pages_of(_layout(tensors, namespace, heads, "BHNKD", keys_transposed=False), tensors)


def cpu_pages(
    tensors: Sequence[Tensor], namespace: Namespace, heads: Shard, keys_transposed: bool
) -> Pages:
    """Tensors [blocks, heads, tokens, 2 * head_dim], in each block and head first K, then V.

    The kernels for vector instructions keep K transposed, [head_dim, tokens].
    """
    return Pages(_layout(tensors, namespace, heads, "BHKND", keys_transposed), tensors)


def _layout(
    tensors: Sequence[Tensor],
    namespace: Namespace,
    heads: Shard,
    order: str,
    keys_transposed: bool,
) -> PageLayout:
    blocks, held, block_tokens, width = tensors[0].shape
    if (held, width) != (heads.heads, 2 * namespace.head_dim):
        raise LayoutError(f"its KV tensors are {tuple(tensors[0].shape)}")
    return PageLayout(
        order,
        blocks,
        block_tokens,
        namespace.layers,
        namespace.kv_heads,
        namespace.head_dim,
        namespace.kv_dtype,
        heads=heads,
        keys_transposed=keys_transposed,
    )


def proven(
    candidates: Sequence[Pages], names: Sequence[str], write: Write, device: torch.device
) -> Pages:
    """The candidate from which all that `write` has written is read back.

    Two pages are written, one after the other is read, and both are zeros again afterwards.
    Raises LayoutError where none is right.
    """
    layout = candidates[0].layout
    if layout.blocks < 3:
        raise LayoutError(f"{layout.blocks} pages are too few to see how they are laid out")
    table = [layout.blocks - 1, 1]  # not neighbours, and not in order
    size = layout.block_tokens
    shape = (len(table), layout.layers, 2, size, layout.held.heads, layout.head_dim)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(getattr(torch, layout.dtype))
    slots = torch.cat([torch.arange(size) + page * size for page in table]).to(device)
    written = values.transpose(0, 2).flatten(2, 3).to(device)  # [2, layers, tokens, heads, dim]
    expected = [_bytes_of(page.permute(3, 0, 1, 2, 4)) for page in values]
    blocks = [bytearray(len(page)) for page in expected]
    views = [memoryview(block) for block in blocks]
    try:
        for layer, name in enumerate(names):
            write(name, written[0, layer], written[1, layer], slots)
        for pages in candidates:
            pages.copy_out(table, 0, views, size)
            if blocks == expected:
                return pages
    finally:
        zeros = [memoryview(bytes(len(page))) for page in expected]
        candidates[0].copy_in(table, 0, zeros, size, layout.held, range(len(table) * size))
    raise LayoutError("what its kernel writes is laid out in a way that is not known")


def _bytes_of(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()

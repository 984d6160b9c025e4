"""vLLM's KV tensors as pages, once it has been shown that they are what they are taken for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvstore.connectors.convert import Pages
from kvstore.connectors.page_layout import PageLayout
from kvstore.errors import LayoutError
from kvstore.identity import Namespace
from kvstore.layout import Shard

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Write = Callable[[str, Tensor, Tensor, Tensor], None]
"""Layer name, K and V [tokens, heads, head_dim], slots int64 [tokens]: as the engine writes."""


def vllm_pages(
    config: VllmConfig, tensors: Mapping[str, Tensor], namespace: Namespace, heads: Shard
) -> Pages:
    """The pages of a worker that holds `heads`. To be called before anything is in them.

    Raises LayoutError, one line, unless what vLLM's own kernel writes is read back bit for bit.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    devices = {tensor.device.type for tensor in tensors.values()}
    if devices != {"cpu"}:
        raise LayoutError(f"its KV is on {', '.join(sorted(devices))}; only that of CPUs is known")
    layers = config.compilation_config.static_forward_context
    names = sorted(tensors, key=extract_layer_index)
    if [extract_layer_index(name) for name in names] != list(range(namespace.layers)):
        raise LayoutError(f"its KV is of layers {', '.join(names)}")
    for name in names:
        backend = layers[name].get_attn_backend().get_name()
        if backend != "CPU_ATTN":
            raise LayoutError(f"its attention backend is {backend}; only CPU_ATTN is known")
    ordered = [tensors[name] for name in names]

    def write(name: str, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        layer = layers[name]
        layer.impl.do_kv_cache_update(layer, keys, values, tensors[name], slots)

    return proven([cpu_pages(ordered, namespace, heads, t) for t in (True, False)], names, write)


def cpu_pages(
    tensors: Sequence[Tensor], namespace: Namespace, heads: Shard, keys_transposed: bool
) -> Pages:
    """Tensors [blocks, heads, tokens, 2 * head_dim], in each block and head first K, then V.

    The kernels for vector instructions keep K transposed, [head_dim, tokens].
    """
    blocks, held, block_tokens, width = tensors[0].shape
    if (held, width) != (heads.heads, 2 * namespace.head_dim):
        raise LayoutError(f"its KV tensors are {tuple(tensors[0].shape)}")
    layout = PageLayout(
        "BHKND",
        blocks,
        block_tokens,
        namespace.layers,
        namespace.kv_heads,
        namespace.head_dim,
        namespace.kv_dtype,
        heads=heads,
        keys_transposed=keys_transposed,
    )
    return Pages(layout, tensors)


def proven(candidates: Sequence[Pages], names: Sequence[str], write: Write) -> Pages:
    """The candidate from which all that `write` has written is read back.

    Two pages are written, one after the other is read, and both are zeros again afterwards.
    Raises LayoutError where none is right.
    """
    layout = candidates[0].layout
    if layout.blocks < 3:
        raise LayoutError(f"{layout.blocks} pages are too few to see how they are laid out")
    table = [layout.blocks - 1, 1]  # not neighbours, and not in order
    tokens = len(table) * layout.block_tokens
    shape = (layout.layers, 2, tokens, layout.held.heads, layout.head_dim)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(getattr(torch, layout.dtype))
    slots = torch.cat([torch.arange(layout.block_tokens) + b * layout.block_tokens for b in table])
    expected = np.ascontiguousarray(_bits(values.permute(3, 0, 1, 2, 4)))
    block = np.zeros_like(expected)
    try:
        for layer, name in enumerate(names):
            write(name, values[layer, 0], values[layer, 1], slots)
        for pages in candidates:
            pages.copy_out(table, 0, [block.data.cast("B")], tokens)
            if np.array_equal(block, expected):
                return pages
    finally:
        for part in candidates[0].parts:
            part.bits[:, :, :, table] = 0
    raise LayoutError("what its kernel writes is laid out in a way that is not known")


def _bits(values: Tensor) -> np.ndarray[Any, Any]:
    bits: np.ndarray[Any, Any] = values.contiguous().view(torch.uint8).numpy()
    return bits

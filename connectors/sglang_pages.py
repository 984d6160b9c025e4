"""SGLang's host pools as pages."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch

from kvstore.connectors.convert import Pages
from kvstore.connectors.page_layout import PageLayout
from kvstore.errors import LayoutError
from kvstore.identity import Namespace
from kvstore.layout import Shard

if TYPE_CHECKING:
    from torch import Tensor

# Dimensions of a pool's one buffer, by the name of its layout: letters of `PageLayout`, those
# that are one dimension together. 1 is the only group of heads: of several none is known.
_LAYOUTS = {
    "layer_first": "K L BN H D",
    "page_first": "K BN L H D",
    "page_first_direct": "K B L N H D",
    "page_head": "K B H N L D",
    "page_unified": "B 1 L K N H D",
}
_KV_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def kv_dtype(pool: Any) -> str:
    """The name of the dtype of the pool's KV. Raises LayoutError for one that is not known."""
    if pool.dtype not in _KV_DTYPES:
        raise LayoutError(f"its KV is {pool.dtype}")
    return _KV_DTYPES[pool.dtype]


def host_pages(pool: Any, namespace: Namespace, heads: Shard) -> Pages:
    """The pages of a rank that holds `heads` of the model's.

    Raises LayoutError, one line, unless the pool is the plain one of multi-head attention, laid
    out in a way that is known, with what blocks of `namespace` hold.
    """
    check_pool(pool)
    if pool.layout not in _LAYOUTS:
        raise LayoutError(f"its host pool's layout is {pool.layout}")
    groups = _LAYOUTS[pool.layout].split()
    layout = PageLayout(
        "".join(groups).replace("1", ""),
        pool.page_num,
        pool.page_size,
        pool.layer_num,
        namespace.kv_heads,
        pool.head_dim,
        kv_dtype(pool),
        heads=heads,
    )
    layout.check(namespace.layout)
    if pool.head_num != heads.heads:
        raise LayoutError(f"its host pool holds {pool.head_num} heads, where a rank has {heads}")
    sizes = dict(zip(layout.order, layout.shape, strict=True)) | {"1": 1}
    shape = tuple(prod(sizes[letter] for letter in group) for group in groups)
    buffer = pool.kv_buffer
    if not isinstance(buffer, torch.Tensor) or tuple(buffer.shape) != shape:
        raise LayoutError(f"its host pool is not {shape}, as {pool.layout} should be")
    return Pages(layout, [buffer])


def check_pool(pool: Any) -> None:
    """Raises LayoutError for pools that are more, or less, than K and V of every token."""
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    if type(pool) is not MHATokenToKVPoolHost:  # what derives from it is not it
        raise LayoutError(f"its host pool is {type(pool).__name__}")
    if pool.storage_format_tag is not None or pool.stores_page_envelope or pool.dcp_size > 1:
        raise LayoutError("its host pool's pages have a format of their own")
    if pool.shared_allocation_domain is not None:
        raise LayoutError("its host pool moves its pages")
    if pool.layer_num != pool.target_layer_num:
        raise LayoutError("its host pool holds layers of a draft model as well")
    if pool.head_dim != pool.v_head_dim:
        raise LayoutError(f"its K has {pool.head_dim} elements a head, its V {pool.v_head_dim}")


def page_numbers(host_indices: Tensor, page_size: int, pages: int) -> list[int]:
    """The pages that token places `host_indices` are. Raises LayoutError for parts of pages."""
    if host_indices.numel() != pages * page_size:
        raise LayoutError(f"{host_indices.numel()} places are not {pages} pages of {page_size}")
    rows = host_indices.cpu().reshape(pages, page_size)
    firsts = rows[:, 0]
    if (
        not torch.equal(rows, firsts[:, None] + torch.arange(page_size))
        or (firsts % page_size).any()
    ):
        raise LayoutError("the places of a page's tokens are not one after the other")
    numbers: list[int] = (firsts // page_size).tolist()
    return numbers

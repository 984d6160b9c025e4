"""Other people's decode attention over the same K and V, as far as it is installed.

FlashInfer and FlashAttention read pages as we do, in layouts of their own that are made before
anything is timed. Without them there is torch's attention, over K and V that lie contiguously.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvstore.bench.rows import NotHereError, Unmeasured
from kvstore.bench.sizes import DecodeShape
from kvstore.engine.config import ModelConfig

_FLASHINFER_WORKSPACE_BYTES = 256 << 20
_FLASH_ATTENTION_PAGE_TOKENS = 256  # it takes no smaller ones


class Subject(Protocol):
    """What is attended to; `kv` is [kv_heads, layers, 2, slots, head_dim]."""

    shape: DecodeShape
    kv: Tensor
    query: Tensor  # [batch, heads, head_dim]
    tables: Tensor  # int32 [batch, blocks of a sequence]
    block_tokens: int


class Peer(NamedTuple):
    """`attend()` starts the attention of one layer, and returns as many elements as the query."""

    name: str
    about: str
    attend: Callable[[], Tensor]


def peers(subject: Subject, model: ModelConfig) -> Iterator[Peer | Unmeasured]:
    """Those that are installed and know the dtype; torch's where none of them is there."""
    found = False
    for package, make in (("flashinfer", _flashinfer), ("flash_attn", _flash_attention)):
        if importlib.util.find_spec(package) is None:
            continue
        try:
            peer = make(subject, model)
            peer.attend()  # some compile now, or find out now that they cannot
        except NotHereError as missing:
            yield Unmeasured(package, "skipped", str(missing))
        except Exception as error:  # theirs, of any kind; ours is measured all the same
            text = " ".join(str(error).split())[:300]
            yield Unmeasured(package, "skipped", f"it fails: {type(error).__name__}: {text}")
        else:
            found = True
            yield peer
    if found:
        return
    if subject.kv.element_size() == 1:
        yield Unmeasured(
            "torch", "skipped", "torch's attention takes no fp8, and no other is installed"
        )
    else:
        yield contiguous(subject, subject.query.dtype)


def contiguous(subject: Subject, dtype: torch.dtype) -> Peer:
    """torch's attention of `dtype` over contiguous K and V of the first layer."""
    pages = _pages(subject, subject.block_tokens)
    tables = subject.tables.long()
    batch, context = subject.shape
    # [batch, blocks, kv_heads, tokens, head_dim] -> [batch, kv_heads, context, head_dim]
    keys, values = (
        _picked(half, tables)
        .to(dtype)
        .transpose(1, 2)
        .reshape(batch, half.shape[1], -1, half.shape[3])[:, :, :context]
        .contiguous()
        for half in pages
    )
    query = subject.query.to(dtype)[:, :, None]

    def attend() -> Tensor:
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return Peer("torch", "torch's attention on contiguous K and V", attend)


def _flashinfer(subject: Subject, model: ModelConfig) -> Peer:
    flashinfer: Any = importlib.import_module("flashinfer")
    device, (batch, context) = subject.kv.device, subject.shape
    per_sequence = subject.tables.shape[1]
    keys, values = (half.contiguous() for half in _pages(subject, subject.block_tokens))
    workspace = torch.empty(_FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_tensor_cores=model.heads > model.kv_heads
    )
    last = (context - 1) % subject.block_tokens + 1
    wrapper.plan(
        torch.arange(0, (batch + 1) * per_sequence, per_sequence, dtype=torch.int32, device=device),
        subject.tables.flatten(),
        torch.full((batch,), last, dtype=torch.int32, device=device),
        model.heads,
        model.kv_heads,
        model.head_dim,
        subject.block_tokens,
        q_data_type=subject.query.dtype,
        kv_data_type=subject.kv.dtype,
    )
    name = f"FlashInfer {flashinfer.__version__}"
    about = f"its paged decode, pages of {subject.block_tokens} tokens"
    return Peer(name, about, lambda: wrapper.run(subject.query, (keys, values)))


def _flash_attention(subject: Subject, model: ModelConfig) -> Peer:
    if subject.kv.element_size() == 1:
        raise NotHereError("FlashAttention 2 takes no fp8")
    flash: Any = importlib.import_module("flash_attn")
    device, (batch, context) = subject.kv.device, subject.shape
    tokens = _FLASH_ATTENTION_PAGE_TOKENS
    each, rest = divmod(context, tokens)
    if rest:
        raise NotHereError(f"FlashAttention's pages of {tokens} tokens do not divide {context}")
    own = contiguous_pages(subject, tokens)
    order = torch.randperm(batch * each, device=device)
    tables = order.to(torch.int32).view(batch, each)
    keys, values = (torch.empty_like(half).index_copy_(0, order, half) for half in own)
    lens = torch.full((batch,), context, dtype=torch.int32, device=device)
    query = subject.query[:, None]
    return Peer(
        f"FlashAttention {flash.__version__}",
        f"its paged decode, pages of {tokens} tokens",
        lambda: flash.flash_attn_with_kvcache(
            query, keys, values, cache_seqlens=lens, block_table=tables, causal=True
        ),
    )


def contiguous_pages(subject: Subject, tokens: int) -> tuple[Tensor, Tensor]:
    """K and V of the first layer, [pages, tokens, kv_heads, head_dim], in sequences' order."""
    keys, values = (
        _picked(half, subject.tables.long())
        .transpose(2, 3)
        .reshape(-1, tokens, half.shape[1], half.shape[3])
        for half in _pages(subject, subject.block_tokens)
    )
    return keys, values


def _pages(subject: Subject, tokens: int) -> tuple[Tensor, Tensor]:
    """K and V of the first layer, views [blocks, kv_heads, tokens, head_dim]."""
    heads, _, _, slots, head_dim = subject.kv.shape
    keys, values = (
        subject.kv[:, 0, half].view(heads, slots // tokens, tokens, head_dim).transpose(0, 1)
        for half in range(2)
    )
    return keys, values


def _picked(pages: Tensor, tables: Tensor) -> Tensor:
    """[batch, blocks, ...] by their bits, since not every device picks elements of every type."""
    bits = pages.view(torch.uint8)[tables]
    return bits.view(pages.dtype)

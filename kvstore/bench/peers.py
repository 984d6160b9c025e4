"""Other people's decode attention over the same K and V, as far as it is installed.

FlashInfer and FlashAttention read pages as we do, in layouts of their own that are made before
anything is timed. Without them there is torch's attention, over K and V that lie contiguously.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from kvstore.bench.rows import NotHereError, Unmeasured
from kvstore.bench.sizes import DecodeShape
from kvstore.engine.config import ModelConfig

Attend = Callable[[], Tensor]

_FLASHINFER_WORKSPACE_BYTES = 256 << 20
_FLASH_ATTENTION_PAGE_TOKENS = 256  # it takes no smaller ones
_BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
_TRIES = 3  # of each, of which the first makes what it needs


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
    attend: Attend


def peers(
    subject: Subject, model: ModelConfig, seconds: Callable[[Attend], float]
) -> Iterator[Peer | Unmeasured]:
    """Those that are installed and know the dtype; torch's where none of them is there.

    `seconds` says how long the device takes for one of them, so that torch's quickest is found.
    """
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
        yield torch_attention(subject, seconds)


class Contiguous(NamedTuple):
    """What torch attends to: K and V of the first layer, [batch, kv_heads, context, head_dim]."""

    query: Tensor  # [batch, heads, 1, head_dim]
    keys: Tensor
    values: Tensor

    def attend(self) -> Tensor:
        """In the way that torch chooses."""
        return scaled_dot_product_attention(*self, enable_gqa=True)

    def attend_grouped(self) -> Tensor:
        """The same, the heads that share a K and V being the tokens of one query."""
        batch, heads, _, head_dim = self.query.shape
        query = self.query.view(batch, self.keys.shape[1], -1, head_dim)
        attended = scaled_dot_product_attention(query, self.keys, self.values)
        return attended.reshape(batch, heads, -1)


def contiguous(subject: Subject, dtype: torch.dtype) -> Contiguous:
    """K, V and query in `dtype`."""
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
    return Contiguous(subject.query.to(dtype)[:, :, None], keys, values)


def torch_attention(subject: Subject, seconds: Callable[[Attend], float]) -> Peer:
    """The quickest of torch's ways, over K and V that lie contiguously."""
    over = contiguous(subject, subject.query.dtype)
    tried: list[tuple[float, str, Attend]] = []
    for backend in _BACKENDS:
        for how, attend in (("", over.attend), (", heads grouped", over.attend_grouped)):
            by = partial(_by, backend, attend)
            try:
                taken_s = min(seconds(by) for _ in range(_TRIES))
            except RuntimeError:  # not on this device, or not for these shapes; or no room for it
                continue
            tried.append((taken_s, f"{backend.name.lower()}{how}", by))
    _, name, attend = min(tried, key=itemgetter(0))
    about = f"torch's attention on contiguous K and V by {name}, the quickest of {len(tried)} ways"
    return Peer("torch", about, attend)


def _by(backend: SDPBackend, attend: Attend) -> Tensor:
    with warnings.catch_warnings(), sdpa_kernel(backend):
        warnings.simplefilter("ignore")  # why a backend cannot be used
        return attend()


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

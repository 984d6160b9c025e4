"""What is measured beside our attention computes the same, from the same K and V.

FlashInfer and FlashAttention run on GPUs only. Here packages of their names stand in, which take
what theirs is documented to take, and compute it in torch, so that pages given to them in a
wrong order or layout would show.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstore.bench.attention import FP8, Decoding, _compare
from kvstore.bench.benchmark import Bench
from kvstore.bench.pages import random_kv
from kvstore.bench.peers import Attend, Peer, contiguous, peers
from kvstore.bench.rows import Unmeasured
from kvstore.bench.sizes import TINY, DecodeShape
from kvstore.kernels import reference

SHAPE = DecodeShape(2, 512)


def decoding(bench: Bench, dtype: torch.dtype = torch.bfloat16) -> Decoding:
    slots = SHAPE.batch * SHAPE.context_tokens
    kv = random_kv(TINY.model, slots, 1, dtype, bench.card.device)
    return Decoding(bench, SHAPE, kv)


def attended(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One sequence: [heads, head_dim] over [kv_heads, tokens, head_dim], in float64."""
    shared = len(query) // len(keys)
    keys, values = (half.double().repeat_interleave(shared, 0) for half in (keys, values))
    scores = (keys @ query.double()[:, :, None])[..., 0] / query.shape[1] ** 0.5
    return (torch.softmax(scores, -1)[:, None] @ values)[:, 0]


class FlashInferWrapper:
    """Of `flashinfer.BatchDecodeWithPagedKVCacheWrapper`: HND pages, tables as in CSR."""

    def __init__(self, workspace: Tensor, layout: str, use_tensor_cores: bool = False) -> None:
        assert workspace.dtype == torch.uint8
        assert layout == "HND"

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert {t.dtype for t in (indptr, indices, last_page_len)} == {torch.int32}
        self.tables = [
            indices[start:stop].long()
            for start, stop in zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)
        ]
        self.last, self.shape = last_page_len.tolist(), (kv_heads, page_size, head_dim)
        self.heads = heads

    def run(self, query: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        out = torch.empty_like(query)
        assert query.shape[1] == self.heads
        for row, (table, last) in enumerate(zip(self.tables, self.last, strict=True)):
            tokens = (len(table) - 1) * self.shape[1] + last
            halves = []
            for half in pages:
                assert half.is_contiguous()
                assert half.shape[1:] == self.shape
                own = half[table].transpose(0, 1).reshape(self.shape[0], -1, self.shape[2])
                halves.append(own[:, :tokens])
            out[row] = attended(query[row], *halves)
        return out


def flash_attn_with_kvcache(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    cache_seqlens: Tensor,
    block_table: Tensor,
    causal: bool,
) -> Tensor:
    """Pages [pages, tokens, kv_heads, head_dim] of at least 256 tokens."""
    assert causal
    assert keys.shape[1] % 256 == 0
    assert {cache_seqlens.dtype, block_table.dtype} == {torch.int32}
    out = torch.empty_like(query)
    for row, (table, tokens) in enumerate(
        zip(block_table.long(), cache_seqlens.tolist(), strict=True)
    ):
        halves = [half[table].flatten(0, 1)[:tokens].transpose(0, 1) for half in (keys, values)]
        out[row, 0] = attended(query[row, 0], *halves)
    return out


def failing(*args: Any, **options: Any) -> Tensor:
    raise RuntimeError("no kernel image\n for this device")


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(members, __version__="1.2.3")
    monkeypatch.setitem(sys.modules, name, module)


def test_torch_stands_in_where_nobody_else_is_there(bench: Bench) -> None:
    ours = decoding(bench)
    (peer,) = peers(ours, TINY.model, bench.card.seconds)
    assert isinstance(peer, Peer)
    right = reference.decode(
        ours.query, ours.kv, 0, ours.tables, ours.lens, ours.block_tokens, ours.scales
    )
    got = peer.attend().view(right.shape).double()
    torch.testing.assert_close(got, right, rtol=0.02, atol=0.02)
    _compare(ours, peer.attend, peer.name)


@pytest.mark.parametrize("quickest", range(4))
def test_of_torchs_ways_the_quickest_is_measured_and_named(bench: Bench, quickest: int) -> None:
    """On a CPU there are two of its backends, each with heads apart and grouped."""
    ours, ways = decoding(bench), ("flash_attention", "math")
    tried: list[Attend] = []

    def seconds(attend: Attend) -> float:
        attend()
        if attend not in tried:
            tried.append(attend)
        return 1.0 if tried.index(attend) == quickest else 2.0

    (peer,) = peers(ours, TINY.model, seconds)
    assert isinstance(peer, Peer)
    grouped = ", heads grouped" if quickest % 2 else ""
    assert f"by {ways[quickest // 2]}{grouped}, the quickest of 4 ways" in peer.about
    assert peer.attend is tried[quickest]
    _compare(ours, peer.attend, peer.name)


def test_contiguous_fp8_in_float32(bench: Bench) -> None:
    ours = decoding(bench, FP8)
    right = reference.decode(
        ours.query, ours.kv, 0, ours.tables, ours.lens, ours.block_tokens, ours.scales
    )
    peer = contiguous(ours, torch.float32)
    torch.testing.assert_close(peer.attend()[:, :, 0].double(), right, rtol=1e-4, atol=1e-4)


def test_both_libraries_get_the_pages_as_they_want_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=FlashInferWrapper)
    install(monkeypatch, "flash_attn", flash_attn_with_kvcache=flash_attn_with_kvcache)
    ours = decoding(bench)
    found = list(peers(ours, TINY.model, bench.card.seconds))
    assert [each.name for each in found] == ["FlashInfer 1.2.3", "FlashAttention 1.2.3"]
    for peer in found:
        assert isinstance(peer, Peer)
        _compare(ours, peer.attend, peer.name)


def test_of_fp8_flashinfer_alone_is_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=FlashInferWrapper)
    install(monkeypatch, "flash_attn", flash_attn_with_kvcache=flash_attn_with_kvcache)
    ours = decoding(bench, FP8)
    monkeypatch.setattr(FlashInferWrapper, "run", _run_of_bits)
    infer, attention = peers(ours, TINY.model, bench.card.seconds)
    assert isinstance(infer, Peer)
    _compare(ours, infer.attend, infer.name)
    assert attention == Unmeasured("flash_attn", "skipped", "FlashAttention 2 takes no fp8")


def _run_of_bits(wrapper: Any, query: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
    """torch on a CPU picks no fp8 pages."""
    keys, values = (half.float() for half in pages)
    return FLASHINFER_RUN(wrapper, query, (keys, values))


FLASHINFER_RUN = FlashInferWrapper.run


def test_a_library_that_fails_is_said_and_torch_takes_its_place(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "flash_attn", flash_attn_with_kvcache=failing)
    said, peer = peers(decoding(bench), TINY.model, bench.card.seconds)
    assert said == Unmeasured(
        "flash_attn", "skipped", "it fails: RuntimeError: no kernel image for this device"
    )
    assert peer.name == "torch"


def test_another_result_is_no_figure(bench: Bench) -> None:
    ours = decoding(bench)
    right = contiguous(ours, torch.bfloat16).attend()
    with pytest.raises(RuntimeError, match="differs from wrong's by 0"):
        _compare(ours, lambda: right + 0.1, "wrong")
    with pytest.raises(RuntimeError, match="differs from nan's"):
        _compare(ours, lambda: torch.full_like(ours.query, torch.nan), "nan")

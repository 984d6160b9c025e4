"""Right to float32's precision, and the same bits in any company."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvstore.kernels import reference
from kvstore.kernels.paged_attention import KEY_RUN, PagedAttention, Workspace
from kvstore.kernels.quantise import quantise

BLOCK_TOKENS = 4
BLOCKS = 160
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 6, 2, 16, 2
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8)
# Of each KV head, layer, K and V; no two alike.
SCALES = torch.rand(KV_HEADS, LAYERS, 2, generator=torch.Generator().manual_seed(7)) + 0.5


@dataclass
class Span:
    query_tokens: int
    context_tokens: int
    block_table: Sequence[int]


@pytest.fixture(params=DTYPES, ids=str)
def kv(request: pytest.FixtureRequest) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (KV_HEADS, LAYERS, 2, BLOCKS * BLOCK_TOKENS, HEAD_DIM)
    values, dtype = torch.randn(shape, generator=generator), request.param
    if dtype.itemsize > 1:
        return values.to(dtype)
    scales = scales_of(torch.empty(0, dtype=dtype))
    assert scales is not None
    return quantise(values, scales[..., None, None], dtype)


def scales_of(kv: Tensor) -> Tensor | None:
    if kv.element_size() > 1:
        return None
    return SCALES / (127 if kv.dtype == torch.int8 else 448)


def bits(kv: Tensor) -> Tensor:
    """Torch does not index every dtype."""
    return kv.view(torch.int8) if kv.element_size() == 1 else kv


def query_of(tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, HEADS * HEAD_DIM, generator=generator)


def scattered(tokens: int, seed: int = 0) -> list[int]:
    return random.Random(seed).sample(range(BLOCKS), -(-tokens // BLOCK_TOKENS))


def attend(spans: Sequence[Span], kv: Tensor, query: Tensor, layer: int = 0) -> Tensor:
    attention = PagedAttention(
        spans,
        kv,
        heads=HEADS,
        block_tokens=BLOCK_TOKENS,
        workspace=Workspace(),
        scales=scales_of(kv),
    )
    return attention(query, layer)


SPANS = [
    [Span(1, 0, [7])],
    [Span(1, 200, range(60))],
    [Span(3, 0, [9])],
    [Span(40, 0, scattered(40))],
    [Span(77, 100, scattered(177))],
    [Span(2, KEY_RUN - 1, scattered(KEY_RUN + 1))],
    [Span(1, 30, scattered(31, 1)), Span(1, 300, scattered(301, 2)), Span(1, 3, [5])],
    [Span(1, 30, scattered(31, 1)), Span(50, 20, scattered(70, 2)), Span(9, 0, range(3, 6))],
]


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("spans", SPANS, ids=range(len(SPANS)))
def test_as_the_reference(spans: list[Span], kv: Tensor, layer: int) -> None:
    query = query_of(sum(span.query_tokens for span in spans))
    heads, scales = query.view(-1, HEADS, HEAD_DIM), scales_of(kv)
    wide = kv.double() if scales is None else kv.double() * scales[..., None, None].double()
    expected = reference.paged_attention(heads, wide, layer, spans, BLOCK_TOKENS)
    out = attend(spans, kv, query, layer).view(heads.shape)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 16, 37, 100])
def test_the_same_bits_however_a_prompt_is_cut(kv: Tensor, chunk: int) -> None:
    tokens = 150
    table = scattered(tokens)
    query = query_of(tokens)
    whole = attend([Span(tokens, 0, table)], kv, query)
    parts = [
        attend([Span(min(chunk, tokens - done), done, table)], kv, query[done : done + chunk])
        for done in range(0, tokens, chunk)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_the_same_bits_in_any_company(kv: Tensor) -> None:
    lengths = [1, 4, 31, 127, 128, 129, 256, 300, 511, 64, 65]
    spans = [Span(1, length - 1, scattered(length, length)) for length in lengths]
    spans.insert(5, Span(20, 10, scattered(30, 99)))
    query = query_of(sum(span.query_tokens for span in spans))
    together = attend(spans, kv, query)
    first = 0
    for span in spans:
        rows = slice(first, first + span.query_tokens)
        assert torch.equal(attend([span], kv, query[rows]), together[rows])
        first = rows.stop


def test_the_same_bits_wherever_the_blocks_lie(kv: Tensor) -> None:
    tokens = 90
    table = scattered(tokens)
    run = range(30, 30 + len(table))
    other = kv.clone()
    offsets = torch.arange(BLOCK_TOKENS)
    for source, target in zip(table, run, strict=True):
        place = target * BLOCK_TOKENS + offsets
        bits(other)[:, :, :, place] = bits(kv)[:, :, :, source * BLOCK_TOKENS + offsets]
    query = query_of(7)
    here = attend([Span(7, tokens - 7, table)], kv, query)
    assert torch.equal(attend([Span(7, tokens - 7, run)], other, query), here)


def test_what_is_beyond_a_sequence_is_not_looked_at(kv: Tensor) -> None:
    """Another sequence's numbers, or what is left of one, even if they are not numbers."""
    table = [3, 4]
    query = query_of(1)
    clean = attend([Span(1, 4, table)], kv, query)
    kv[:, :, :, 4 * BLOCK_TOKENS + 1 :] = -128 if kv.dtype == torch.int8 else float("nan")
    assert torch.equal(attend([Span(1, 4, table)], kv, query), clean)


def test_rows_that_pad_a_batch_come_back_as_zeros(kv: Tensor) -> None:
    out = attend([Span(1, 8, [1, 2, 3])], kv, query_of(4))
    assert not out[1:].any()
    assert out[0].any()

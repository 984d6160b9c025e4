"""Causal attention over paged KV, in plain torch, in float32.

What makes it more than a few calls of torch is that the result of a query does not
depend on its company, bit for bit: not on the other sequences of the batch, not on how a
prompt was cut into chunks, not on where the cached prefix ended, not on whether a token
was computed as part of a prompt or decoded alone. docs/adr/0020-determinism.md has the
measurements. It comes from three rules:

- keys are padded to whole runs of KEY_RUN, and the weighted sum over values adds the runs
  one after another, so the order of additions depends on a key's position alone;
- a matrix product never has fewer than MIN_ROWS rows: below, BLAS takes other kernels;
- scores, softmax and sums are float32 whatever the KV's dtype is. (On a CPU converting K
  and V first is also faster than bf16 products of this shape.) Scales of KV of one byte are
  multiplied into queries and results, of which there are fewer than of keys.

Query heads that share a KV head are rows of one product, so no K or V is ever repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import inf, prod
from typing import Protocol

import torch
from torch import Tensor

from kvstore.kernels.quantise import UNIT, widen

KEY_RUN = 128
MIN_ROWS = 4
# Rows of a score matrix: enough to feed the matrix product, few enough to stay in cache.
TILE_ROWS = 96
# Sequences that decode share their calls while their gathered K and V stay under this.
GROUP_FLOATS = 1 << 18
# A block table in more pieces than this is gathered by index instead of piece by piece.
MAX_PIECES = 8


class Span(Protocol):
    """One sequence's share of a batch; see kvstore.engine.batch.SequenceSpan."""

    @property
    def query_tokens(self) -> int: ...
    @property
    def context_tokens(self) -> int: ...
    @property
    def block_table(self) -> Sequence[int]: ...


class Workspace:
    """Float32 scratch memory that outlives a step. Grows to the largest step, and never shrinks."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._memory = torch.zeros(0, device=device)

    def split(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Tensors of these shapes, next to one another, that alias every other split."""
        sizes = [prod(shape) for shape in shapes]
        if sum(sizes) > self._memory.numel():
            self._memory = torch.zeros(sum(sizes), device=self._memory.device)
        parts = self._memory[: sum(sizes)].split_with_sizes(sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class PagedAttention:
    """Attention of one batch: made once a step, called once a layer.

    `kv` is [kv_heads, layers, 2, slots, head_dim]; K and V of the batch's own tokens must
    be in it before the call. `scales`, float32 [kv_heads, layers, 2], is what K and V of fp8
    and int8 are multiplied by. Views of the scratch memory are made here, not in every layer.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        kv: Tensor,
        *,
        heads: int,
        block_tokens: int,
        workspace: Workspace,
        scales: Tensor | None = None,
    ) -> None:
        if scales is not None:
            scales = scales * UNIT[kv.dtype]
        firsts = [0]
        for span in spans:
            firsts.append(firsts[-1] + span.query_tokens)
        rows = _groups(spans, kv.shape[0] * kv.shape[4])
        self._groups = [
            _Group(
                [spans[i] for i in members],
                [firsts[i] for i in members],
                kv,
                heads,
                block_tokens,
                workspace,
                scales,
            )
            for members in rows
        ]

    def __call__(self, query: Tensor, layer: int) -> Tensor:
        """float32 [rows, heads * head_dim] in and out: T rows in the order of the spans, and
        any that pad the batch; these come back as zeros."""
        out = torch.zeros_like(query)
        for group in self._groups:
            group.attend(query, layer, out)
        return out


def _groups(spans: Sequence[Span], floats_a_token: int) -> Iterator[list[int]]:
    """Numbers of the spans that go together: decoding ones of like length, others alone."""
    alone = [i for i, span in enumerate(spans) if span.query_tokens > 1]
    decoding = [i for i, span in enumerate(spans) if span.query_tokens == 1]
    decoding.sort(key=lambda i: spans[i].context_tokens, reverse=True)
    while decoding:
        longest = _keys(spans[decoding[0]].context_tokens + 1)
        room = max(1, GROUP_FLOATS // (2 * longest * floats_a_token))
        size = sum(2 * _keys(spans[i].context_tokens + 1) > longest for i in decoding[:room])
        yield decoding[:size]
        decoding = decoding[size:]
    yield from ([i] for i in alone)


def _keys(tokens: int) -> int:
    """`tokens`, rounded up to whole runs."""
    return -(-tokens // KEY_RUN) * KEY_RUN


class _Group:
    """Sequences with equally many query tokens, whose products are computed together."""

    def __init__(
        self,
        spans: Sequence[Span],
        firsts: Sequence[int],
        kv: Tensor,
        heads: int,
        block_tokens: int,
        workspace: Workspace,
        scales: Tensor | None,
    ) -> None:
        kv_heads, _, _, _, head_dim = kv.shape
        self.count, self.kv_heads, self.head_dim = len(spans), kv_heads, head_dim
        self.shared = heads // kv_heads  # query heads to a KV head
        self.scales = scales
        queries = spans[0].query_tokens
        tile = min(queries, max(1, TILE_ROWS // self.shared))
        rows = max(MIN_ROWS, tile * self.shared)
        totals = [span.context_tokens + queries for span in spans]
        keys = _keys(max(totals))
        batch = self.count * kv_heads
        self.gathered, self.query, self.scores, self.sums = workspace.split(
            (self.count, kv_heads, 2, keys, head_dim),
            (batch, rows, head_dim),
            (batch * rows * keys,),
            (batch, rows, head_dim),
        )
        flat = self.gathered.view(batch, 2, keys, head_dim)
        self.keys, self.values = flat[:, 0].transpose(1, 2), flat[:, 1]
        self.tail = self.gathered[:, :, 1, min(totals) :]
        self.copies = [
            copy
            for span, total, place in zip(spans, totals, self.gathered, strict=True)
            for copy in _copies(span.block_table, total, block_tokens, kv, place)
        ]
        contexts = torch.tensor([span.context_tokens for span in spans], device=kv.device)
        starts = torch.tensor(firsts, device=kv.device)
        self.tiles = [
            _Tile(self, contexts, starts, first, min(first + tile, queries))
            for first in range(0, queries, tile)
        ]

    def attend(self, query: Tensor, layer: int, out: Tensor) -> None:
        self.tail.zero_()  # a weight of 0 times what another sequence left here might be NaN
        for copy in self.copies:
            copy.run(layer)
        scales = None if self.scales is None else self.scales[:, layer, :, None, None].unbind(1)
        for tile in self.tiles:
            tile.attend(query, out, scales)


class _Tile:
    """Some consecutive query tokens of each sequence of a group, and the keys that they see."""

    def __init__(
        self, group: _Group, contexts: Tensor, starts: Tensor, first: int, last: int
    ) -> None:
        tokens, rows = last - first, group.query.shape[1]
        keys = _keys(int(contexts.max()) + last)
        batch, used = group.query.shape[0], tokens * group.shared
        if used >= MIN_ROWS:
            rows = used
        self.rows = (starts[:, None] + torch.arange(first, last, device=starts.device)).flatten()
        # [count, tokens, kv_heads, shared, head_dim] is how rows of the batch lie.
        self.shape = (group.count, tokens, group.kv_heads, group.shared, group.head_dim)
        self.query, self.sums = group.query[:, :rows], group.sums[:, :rows]
        self.scores = group.scores[: batch * rows * keys].view(batch, rows, keys)
        self.keys = group.keys[:, :, :keys]
        self.runs = [
            (self.scores[:, :, run : run + KEY_RUN], group.values[:, run : run + KEY_RUN])
            for run in range(0, keys, KEY_RUN)
        ]
        self.scale = group.head_dim**-0.5
        # Hidden keys: those after a row's own position. None is hidden before `seen`.
        seen = int(contexts.min()) + first + 1
        tokens_in = first + torch.arange(rows, device=contexts.device) // group.shared
        positions = contexts[:, None] + tokens_in
        hidden = torch.arange(seen, keys, device=contexts.device) > positions[:, :, None]
        self.hidden = hidden[:, None]
        self.maybe_hidden = self.scores.view(group.count, group.kv_heads, rows, keys)[..., seen:]
        in_rows = (group.count, group.kv_heads, rows, group.head_dim)
        in_tokens = (group.count, group.kv_heads, tokens, group.shared, group.head_dim)
        self.query_in = self.query.view(in_rows)[:, :, :used].view(in_tokens)
        self.sums_out = self.sums.view(in_rows)[:, :, :used].view(in_tokens).transpose(1, 2)

    def attend(self, query: Tensor, out: Tensor, scales: Sequence[Tensor] | None) -> None:
        """`scales`: those of K and of V, [kv_heads, 1, 1]."""
        query_in = query.index_select(0, self.rows).view(self.shape)
        if scales is not None:
            query_in *= scales[0]
        self.query_in.copy_(query_in.transpose(1, 2))
        self.scores.baddbmm_(self.query, self.keys, beta=0, alpha=self.scale)
        self.maybe_hidden.masked_fill_(self.hidden, -inf)
        torch.softmax(self.scores, -1, out=self.scores)
        for number, (weights, values) in enumerate(self.runs):
            self.sums.baddbmm_(weights, values, beta=min(number, 1))
        sums = self.sums_out
        if scales is not None:
            sums = sums * scales[1]
        out.index_copy_(0, self.rows, sums.reshape(self.rows.shape[0], -1))


class _Copy:
    """Brings K and V of one piece of a block table, or of all of it, into scratch memory."""

    def __init__(self, source: Tensor, slots: Tensor | None, target: Tensor) -> None:
        self.source = source
        self.slots = slots
        self.target = target

    def run(self, layer: int) -> None:
        source = self.source.select(1, layer)
        if self.slots is not None:
            source = source.index_select(2, self.slots)
        widen(source, self.target)


def _copies(
    table: Sequence[int], tokens: int, block_tokens: int, kv: Tensor, place: Tensor
) -> Iterator[_Copy]:
    """How `tokens` tokens get from `kv` to `place` [kv_heads, 2, keys, head_dim].

    Blocks that follow one another in memory are one piece, whose copy reads a plain view.
    """
    table = table[: -(-tokens // block_tokens)]
    cuts = [i + 1 for i, (a, b) in enumerate(pairwise(table)) if b != a + 1]
    if len(cuts) >= MAX_PIECES:
        blocks = torch.tensor(table, device=kv.device)[:, None] * block_tokens
        slots = (blocks + torch.arange(block_tokens, device=kv.device)).flatten()[:tokens]
        yield _Copy(kv, slots, place[:, :, :tokens])
        return
    for first, last in pairwise([0, *cuts, len(table)]):
        start, stop = first * block_tokens, min(last * block_tokens, tokens)
        slot = table[first] * block_tokens
        yield _Copy(kv[:, :, :, slot : slot + stop - start], None, place[:, :, start:stop])

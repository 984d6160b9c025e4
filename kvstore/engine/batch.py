"""What one forward pass computes: rows of tokens of several sequences, laid end to end."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CPU = torch.device("cpu")


def to_device(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """A tensor of `values`, which are not to be changed any more. Does not wait for the device."""
    host = torch.from_numpy(values)
    if device.type != "cuda" or not len(host):
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """The tokens of one sequence that a step computes: a prefill chunk, or one decode token.

    `context_tokens` are in the KV tensor before the step; the `query_tokens` that
    follow them are written to it by the step. `block_table[i]` is the physical
    block of tokens `[i * block_tokens, (i + 1) * block_tokens)`, and covers both.
    """

    query_tokens: int
    context_tokens: int
    block_table: Sequence[int]

    @property
    def total_tokens(self) -> int:
        """Tokens in the KV tensor after the step."""
        return self.context_tokens + self.query_tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """Input of one forward pass; T rows, in the order of the spans.

    `tokens`, `positions` and `slots` are int64 [T] on the decoder's device. A slot
    is a token's place in the KV tensor: `block * block_tokens + offset`.
    `logits_rows` (int64 [R], ascending) names the rows whose logits are wanted;
    `logits_spans[i]` is what row `logits_rows[i]` attends to, as a span of that one token.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    spans: tuple[SequenceSpan, ...]
    logits_rows: Tensor
    logits_spans: tuple[SequenceSpan, ...]
    block_tokens: int

    @classmethod
    def build(
        cls,
        spans: Sequence[SequenceSpan],
        tokens: Sequence[Sequence[int]],
        *,
        block_tokens: int,
        logits_rows: Sequence[int] | None = None,
        device: torch.device = CPU,
    ) -> Batch:
        """Lay `tokens[i]`, the query tokens of `spans[i]`, end to end.

        Without `logits_rows` the logits of every span's last row are wanted.
        Raises ValueError when tokens, spans, rows and block tables do not fit.
        """
        _check(spans, tokens, block_tokens)
        positions = [p for s in spans for p in range(s.context_tokens, s.total_tokens)]
        slots = [
            s.block_table[p // block_tokens] * block_tokens + p % block_tokens
            for s in spans
            for p in range(s.context_tokens, s.total_tokens)
        ]
        ends = list(accumulate(span.query_tokens for span in spans))
        if logits_rows is None:
            logits_rows = [end - 1 for end in ends]
        elif any(a >= b for a, b in pairwise([-1, *logits_rows, sum(map(len, tokens))])):
            raise ValueError(f"logits of rows {list(logits_rows)}: not ascending, or not there")

        def tensor(values: Sequence[int]) -> Tensor:
            return to_device(np.array(values, dtype=np.int64), device)

        return cls(
            tokens=tensor(list(chain.from_iterable(tokens))),
            positions=tensor(positions),
            slots=tensor(slots),
            spans=tuple(spans),
            logits_rows=tensor(logits_rows),
            logits_spans=tuple(_span_of(row, spans, ends) for row in logits_rows),
            block_tokens=block_tokens,
        )


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """One token of each of B sequences, as a device sees it: tensors that stay where they are.

    `tokens`, `positions` and `slots` are int64 [B]; `block_tables` int32 [B, max_blocks], and
    `context_lens` int32 [B] counts the token itself. Rows that pad the batch come last: slot
    -1, and 0 tokens of context.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    context_lens: Tensor
    block_tokens: int


def _span_of(row: int, spans: Sequence[SequenceSpan], ends: Sequence[int]) -> SequenceSpan:
    """Row `row` alone, as if it were decoded; span i ends before row `ends[i]`."""
    number = bisect_right(ends, row)
    span = spans[number]
    return SequenceSpan(1, span.total_tokens - (ends[number] - row), span.block_table)


def _check(
    spans: Sequence[SequenceSpan], tokens: Sequence[Sequence[int]], block_tokens: int
) -> None:
    if len(spans) != len(tokens):
        raise ValueError(f"{len(spans)} spans, but tokens for {len(tokens)}")
    for number, (span, own) in enumerate(zip(spans, tokens, strict=True)):
        if span.query_tokens < 1 or span.query_tokens != len(own):
            raise ValueError(f"span {number} has {len(own)} tokens, not {span.query_tokens}")
        if len(span.block_table) * block_tokens < span.total_tokens:
            raise ValueError(f"the block table of span {number} is shorter than its tokens")

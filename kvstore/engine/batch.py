"""What one forward pass computes: rows of tokens of several sequences, laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor


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
    `logits_rows` (int64 [R]) names the rows whose logits are wanted.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    spans: tuple[SequenceSpan, ...]
    logits_rows: Tensor
    block_tokens: int

    @classmethod
    def build(
        cls,
        spans: Sequence[SequenceSpan],
        tokens: Sequence[Sequence[int]],
        *,
        block_tokens: int,
        logits_rows: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Lay `tokens[i]`, the query tokens of `spans[i]`, end to end.

        Without `logits_rows` the logits of every span's last row are wanted.
        Raises ValueError when tokens, spans and block tables do not fit.
        """
        _check(spans, tokens, block_tokens)
        positions = [p for s in spans for p in range(s.context_tokens, s.total_tokens)]
        slots = [
            s.block_table[p // block_tokens] * block_tokens + p % block_tokens
            for s in spans
            for p in range(s.context_tokens, s.total_tokens)
        ]
        if logits_rows is None:
            logits_rows, end = [], 0
            for span in spans:
                end += span.query_tokens
                logits_rows.append(end - 1)

        def tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            tokens=tensor(list(chain.from_iterable(tokens))),
            positions=tensor(positions),
            slots=tensor(slots),
            spans=tuple(spans),
            logits_rows=tensor(logits_rows),
            block_tokens=block_tokens,
        )


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

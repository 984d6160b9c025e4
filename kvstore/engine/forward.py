"""From the pieces of a step to logits: which way they are computed on which device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvstore.engine.attention import Attention
from kvstore.engine.batch import Batch, SequenceSpan
from kvstore.engine.decode_steps import DecodeSteps
from kvstore.engine.model import Decoder
from kvstore.engine.scheduler import Piece
from kvstore.tiers.hbm import HbmTier
from kvstore.tiers.hbm_copies import Gates


class Forward:
    """Computes pieces over one HBM tier. Belongs to the engine's loop.

    `steps`, where there are any, are for pieces that all decode; everything else is a batch of
    its own shape.
    """

    def __init__(
        self,
        decoder: Decoder,
        hbm: HbmTier,
        attention: Attention | None = None,
        steps: DecodeSteps | None = None,
    ) -> None:
        self._decoder = decoder
        self._hbm = hbm
        self._attention = attention
        self._steps = steps

    def __call__(self, pieces: Sequence[Piece], gates: Sequence[Gates]) -> Tensor:
        """Logits [pieces that finish, vocab] of the tokens that come next, in their order.

        Blocks that are still on their way are read after their event in each of `gates`.
        """
        steps = self._steps
        if steps is not None and not gates and all(piece.is_decode for piece in pieces):
            return steps.run([piece.sequence for piece in pieces])
        return self._decoder.forward(self._batch(pieces), self._hbm.kv, gates, self._attention)

    def _batch(self, pieces: Sequence[Piece]) -> Batch:
        spans, tokens, rows, end = [], [], [], 0
        for piece in pieces:
            sequence, start = piece.sequence, piece.sequence.computed_tokens
            spans.append(SequenceSpan(piece.tokens, start, sequence.block_table))
            tokens.append(sequence.tokens[start : start + piece.tokens])
            end += piece.tokens
            if piece.finishes:
                rows.append(end - 1)
        return Batch.build(
            spans,
            tokens,
            block_tokens=self._hbm.layout.block_tokens,
            logits_rows=rows,
            device=self._hbm.kv.device,
        )

"""What a decode step reads, in tensors that stay where they are: a CUDA graph knows only those.

Block tables stay on the device from step to step. A step writes the entry of the block that
each sequence writes to; what else is missing goes over before, which is all of a row when its
sequence is new in it, and else nothing. So what a step sends is seven numbers a sequence,
however long the contexts are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvstore.engine.batch import DecodeRows, to_device
from kvstore.engine.sequence import TokenSequence

_TOKEN, _POSITION, _SLOT, _LENGTH, _ENTRY, _BLOCK, _ROW = range(7)


class DecodeBuffers:
    """Rows for up to `max_rows` sequences, with block tables of up to `max_blocks`.

    Belongs to the engine's loop. `fill` writes memory that the device reads without being
    waited for: the step before must have been read from (its tokens drawn) by then.
    """

    def __init__(
        self, max_rows: int, max_blocks: int, block_tokens: int, device: torch.device
    ) -> None:
        self.max_rows = max_rows
        self._max_blocks = max_blocks
        self._block_tokens = block_tokens
        self._staged = torch.zeros((7, max_rows), dtype=torch.int64)
        if device.type == "cuda":
            self._staged = self._staged.pin_memory()
        self._host = self._staged.numpy()
        self._clear(0)
        self._numbers = self._staged.to(device, copy=True)
        self._tables = torch.zeros((max_rows, max_blocks), dtype=torch.int32, device=device)
        self._rows: dict[TokenSequence, int] = {}
        # The very list that a row was written from, and how many entries of it are there. While
        # a sequence decodes, its list only grows; after anything else it is another list, copy
        # on write included: that may happen in a step which these buffers do not see.
        self._lists: list[list[int] | None] = [None] * max_rows
        self._written = [0] * max_rows

    def fill(self, sequences: Sequence[TokenSequence]) -> None:
        """Bring one token of each of `sequences`, all of which decode, to the device."""
        self._place(sequences)
        block_tokens, host = self._block_tokens, self._host
        self._clear(len(sequences))
        for number, sequence in enumerate(sequences):
            row, position = self._rows[sequence], sequence.computed_tokens
            index, offset = divmod(position, block_tokens)
            block = sequence.block_table[index]
            self._complete(row, sequence.block_table, index)
            host[:_ROW, row] = (
                sequence.tokens[position],
                position,
                block * block_tokens + offset,
                position + 1,
                row * self._max_blocks + index,
                block,
            )
            host[_ROW, number] = row
        self._numbers.copy_(self._staged, non_blocking=True)

    def rows(self, count: int) -> DecodeRows:
        """The first `count` rows, as they are when it runs. To be called where it is computed."""
        numbers = self._numbers[:, :count]
        self._tables.view(-1).index_copy_(0, numbers[_ENTRY], numbers[_BLOCK].int())
        return DecodeRows(
            tokens=numbers[_TOKEN],
            positions=numbers[_POSITION],
            slots=numbers[_SLOT],
            block_tables=self._tables[:count],
            context_lens=numbers[_LENGTH].int(),
            block_tokens=self._block_tokens,
        )

    def in_order(self, results: Tensor, out: Tensor) -> Tensor:
        """Rows of `results`, in the order of the sequences that were filled in, to `out`."""
        return torch.index_select(results, 0, self._numbers[_ROW, : len(results)], out=out)

    def _place(self, sequences: Sequence[TokenSequence]) -> None:
        """A row below their number for each; who has one of these keeps it."""
        count = len(sequences)
        if len(self._rows) == count and all(sequence in self._rows for sequence in sequences):
            return
        kept = {s: row for s in sequences if (row := self._rows.get(s, count)) < count}
        free = iter(sorted(set(range(count)) - set(kept.values())))
        self._rows = {s: kept[s] if s in kept else next(free) for s in sequences}
        for row in range(count, self.max_rows):
            self._lists[row] = None

    def _clear(self, count: int) -> None:
        """Rows from `count` on pad the step, and read and write nothing."""
        host = self._host
        host[:, count:] = 0
        host[_SLOT, count:] = -1
        host[_ENTRY, count:] = np.arange(count, self.max_rows) * self._max_blocks
        host[_ROW, count:] = np.arange(count, self.max_rows)

    def _complete(self, row: int, table: list[int], index: int) -> None:
        """See to it that entries before `index` are there; that one is written by the step."""
        if self._lists[row] is not table:
            self._lists[row] = table
            self._written[row] = 0
        if (start := self._written[row]) < index:
            values = to_device(np.array(table[start:index], dtype=np.int32), self._tables.device)
            self._tables[row, start:index].copy_(values, non_blocking=True)
        self._written[row] = index + 1

"""Attention on a CUDA device: kernels that read and write pages in place for tokens that are
decoded, torch's attention for chunks of prompts. docs/adr/0053-engine-on-cuda.md says why.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from kvstore.engine.attention import Attend, Write, write_pairs
from kvstore.engine.batch import SequenceSpan, to_device
from kvstore.engine.config import ModelConfig
from kvstore.kernels.cuda_module import Runtime, runtime_of
from kvstore.kernels.paged_attention_cuda import (
    HEAD_DIMS,
    DecodeWorkspace,
    can_decode,
    decode,
)
from kvstore.kernels.write_kv_cuda import write_kv

# Not cuDNN's: it makes a plan for each length of prompt that it meets, for tens of milliseconds
# in which nobody decodes.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class CudaAttention:
    """For a decoder of which at most `max_rows` sequences are decoded at once.

    Everything runs on torch's current stream; nothing waits for the device. Its workspace is
    used by all batches in turn, and must live as long as a graph in which it was captured.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        max_rows: int,
        runtime: Runtime | None = None,
        scales: Tensor | None = None,
    ) -> None:
        """`runtime` launches the kernels (None: that of the KV's device).

        `scales` float32 [kv_heads, layers, 2], for KV of fp8 or int8.
        """
        self._config = config
        self._max_rows = max_rows
        self._workspace = DecodeWorkspace(max_rows, config.heads, config.head_dim, device)
        self._runtime = runtime
        self._scales = scales

    def can_read_pages(self, dtype: torch.dtype, block_tokens: int) -> bool:
        """Whether the kernels know such KV, and this device has room for them.

        Without them all is gathered, and nothing is captured.
        """
        runtime = self._runtime or runtime_of(self._workspace.memory)
        return can_decode(self._config.head_dim, dtype, block_tokens, self._max_rows, runtime)

    def writer(self, slots: Tensor, kv: Tensor) -> Write:
        def write(pairs: Tensor, layer: int) -> None:
            pairs = pairs[: len(slots)]
            if self._config.head_dim in HEAD_DIMS:
                key, value = pairs.unbind(1)
                write_kv(key, value, kv, layer, slots, None, self._scales, self._runtime)
            else:
                write_pairs(pairs, kv, layer, slots, self._scales)

        return write

    def of_spans(self, spans: Sequence[SequenceSpan], kv: Tensor, block_tokens: int) -> Attend:
        chunks: list[_Chunk] = []
        decoding: list[SequenceSpan] = []
        rows: list[int] = []
        first = 0
        by_kernel = self.can_read_pages(kv.dtype, block_tokens)
        for span in spans:
            if span.query_tokens == 1 and by_kernel:
                decoding.append(span)
                rows.append(first)
            else:
                chunks.append(_Chunk(span, first, kv, block_tokens))
            first += span.query_tokens
        attend_decoding = None
        if decoding:
            tables, lens = _tables(decoding, block_tokens)
            attend_decoding = self.of_tables(
                to_device(tables, kv.device), to_device(lens, kv.device), kv, block_tokens
            )
        places = to_device(np.array(rows, dtype=np.int64), kv.device)

        def attend(query: Tensor, layer: int) -> Tensor:
            out = torch.zeros_like(query)
            if attend_decoding is not None:
                part = attend_decoding(query.index_select(0, places), layer)
                out.index_copy_(0, places, part)
            for chunk in chunks:
                chunk.attend(query, kv, layer, self._config.heads, out, self._scales)
            return out

        return attend

    def of_tables(
        self, block_tables: Tensor, context_lens: Tensor, kv: Tensor, block_tokens: int
    ) -> Attend:
        heads, head_dim = self._config.heads, self._config.head_dim

        def attend(query: Tensor, layer: int) -> Tensor:
            out = torch.empty_like(query)
            decode(
                query.view(-1, heads, head_dim),
                kv,
                layer,
                block_tables,
                context_lens,
                block_tokens,
                out.view(-1, heads, head_dim),
                self._workspace,
                self._scales,
                self._runtime,
            )
            return out

        return attend


class _Chunk:
    """Some tokens of one prompt, rows `first` and on of a batch; they see all before them."""

    def __init__(self, span: SequenceSpan, first: int, kv: Tensor, block_tokens: int) -> None:
        self._rows = slice(first, first + span.query_tokens)
        self._mask = causal_lower_right(span.query_tokens, span.total_tokens)
        table = np.array(span.block_table[: -(-span.total_tokens // block_tokens)], dtype=np.int64)
        self._slots: Tensor | slice
        if (np.diff(table) == 1).all():  # one run in memory: nothing to gather
            start = int(table[0]) * block_tokens
            self._slots = slice(start, start + span.total_tokens)
        else:
            slots = (table[:, None] * block_tokens + np.arange(block_tokens)).reshape(-1)
            self._slots = to_device(slots[: span.total_tokens], kv.device)

    def attend(
        self,
        query: Tensor,
        kv: Tensor,
        layer: int,
        heads: int,
        out: Tensor,
        scales: Tensor | None,
    ) -> None:
        rows = query[self._rows].view(-1, kv.shape[0], heads // kv.shape[0], kv.shape[-1])
        pairs = self._pairs(kv, layer)
        if scales is not None:
            # float16 has room for every number of one byte; scales are for what is float32.
            pairs = pairs.to(torch.float16)
            rows = rows * scales[:, layer, 0, None, None]
        keys, values = pairs.transpose(0, 1)[:, None]
        with sdpa_kernel(_BACKENDS):
            attended = scaled_dot_product_attention(
                rows.flatten(1, 2).transpose(0, 1)[None].to(pairs.dtype),
                keys,
                values,
                attn_mask=self._mask,
                enable_gqa=True,
            )
        result = attended[0].transpose(0, 1).reshape(rows.shape)
        if scales is not None:
            result = result.float() * scales[:, layer, 1, None, None]
        out[self._rows] = result.flatten(1)

    def _pairs(self, kv: Tensor, layer: int) -> Tensor:
        """K and V of all its tokens in one layer: [kv_heads, 2, tokens, head_dim]."""
        if isinstance(self._slots, slice):
            return kv[:, layer, :, self._slots]
        if kv.element_size() > 1:
            return kv[:, layer].index_select(2, self._slots)
        # As bits, since torch does not pick numbers of every dtype.
        return kv[:, layer].view(torch.int8).index_select(2, self._slots).view(kv.dtype)


def _tables(
    spans: Sequence[SequenceSpan], block_tokens: int
) -> tuple[
    np.ndarray[tuple[int, int], np.dtype[np.int32]], np.ndarray[tuple[int], np.dtype[np.int32]]
]:
    """int32 [B, blocks of the longest] and [B]."""
    lens = np.array([span.total_tokens for span in spans], dtype=np.int32)
    used = -(-lens // block_tokens)
    tables = np.zeros((len(spans), int(used.max())), dtype=np.int32)
    for row, (span, count) in enumerate(zip(spans, used.tolist(), strict=True)):
        tables[row, :count] = span.block_table[:count]
    return tables, lens

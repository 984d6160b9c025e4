"""A CUDA device, as an engine uses it. docs/adr/0053-engine-on-cuda.md has the reasons."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from kvstore.engine.attention_cuda import CudaAttention
from kvstore.engine.batch import Batch, SequenceSpan
from kvstore.engine.decode_steps import DecodeSteps, GraphCapture, step_sizes
from kvstore.engine.device import Observe
from kvstore.engine.forward import Forward
from kvstore.engine.hbm_size import kv_bytes
from kvstore.engine.model import Decoder
from kvstore.kernels.cuda_module import Runtime
from kvstore.layout import BlockLayout
from kvstore.tiers.hbm import TORCH_DTYPE, HbmTier
from kvstore.tiers.hbm_cuda import CudaCopies
from kvstore.verbs import Store


class CudaDevice:
    """Computes on torch's current stream of the decoder's device, and waits for it only where
    tokens are drawn.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_batch: int,
        scales: Tensor | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        """`scales`, for KV of one byte, and `runtime` are what `CudaAttention` takes."""
        self._decoder = decoder
        self._max_batch = max_batch
        rows = step_sizes(max_batch)[-1]
        self._attention = CudaAttention(decoder.config, decoder.device, rows, runtime, scales)
        self._measured: deque[tuple[Any, Any, Observe]] = deque()  # begin, end; oldest first

    def hbm_bytes(self, layout: BlockLayout, chunk_tokens: int, fraction: float) -> int:
        workspace_bytes = self._workspace_bytes(layout, chunk_tokens)
        torch.cuda.empty_cache()
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._decoder.device)
        return kv_bytes(total_bytes, free_bytes, workspace_bytes, fraction)

    def forward(self, hbm: HbmTier, store: Store | None) -> Forward:
        """Also pins the store's memory, and captures a graph for each size of step."""
        if store is not None and isinstance(hbm.copies, CudaCopies):
            memory = store.memory()
            if memory is not None:
                hbm.copies.pin(memory)
        decoder, layout = self._decoder, hbm.layout
        steps = None
        if self._attention.can_read_pages(hbm.kv.dtype, layout.block_tokens):
            steps = DecodeSteps(
                decoder,
                hbm.kv,
                self._attention,
                GraphCapture(decoder.device),
                max_batch=self._max_batch,
                block_tokens=layout.block_tokens,
            )
        return Forward(decoder, hbm, self._attention, steps)

    def stopwatch(self) -> Callable[[Observe], None]:
        """Measures on the device: the host is done long before, or waits for something else."""
        while self._measured and self._measured[0][1].query():
            begin, end, observe = self._measured.popleft()
            observe(begin.elapsed_time(end) / 1e3)
        event: Callable[..., Any] = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record(torch.cuda.current_stream(self._decoder.device))

        def stop(observe: Observe) -> None:
            end.record(torch.cuda.current_stream(self._decoder.device))
            self._measured.append((begin, end, observe))

        return stop

    def phase(self, name: str) -> AbstractContextManager[object]:
        return torch.cuda.nvtx.range(name)

    def _workspace_bytes(self, layout: BlockLayout, chunk_tokens: int) -> int:
        """What the largest step takes beside weights and KV: measured with one of that size.

        And what a chunk at the end of the longest context gathers, which it does not have.
        """
        device, config = self._decoder.device, self._decoder.config
        torch.cuda.reset_peak_memory_stats(device)
        before_bytes = torch.cuda.memory_allocated(device)
        kv = self.compute_largest_step(layout, chunk_tokens)
        torch.cuda.synchronize(device)
        heads, _, pair, _, head_dim = layout.shape
        # KV of one byte is gathered as it is, and then widened to two.
        element_bytes = kv.element_size() + 2 * (kv.element_size() == 1)
        gathered_bytes = config.context_tokens * heads * pair * head_dim * element_bytes
        taken_bytes = torch.cuda.max_memory_allocated(device) - before_bytes
        return taken_bytes - kv.nbytes + gathered_bytes

    def compute_largest_step(self, layout: BlockLayout, chunk_tokens: int) -> Tensor:
        """A prompt in one chunk, while all others decode; over KV of its own, returned."""
        tokens, config = layout.block_tokens, self._decoder.config
        chunk_tokens = min(chunk_tokens, config.context_tokens)
        chunk_blocks = -(-chunk_tokens // tokens)
        others = self._max_batch - 1
        device = self._decoder.device
        heads, layers, pair, _, head_dim = layout.shape
        kv = torch.zeros(
            (heads, layers, pair, (chunk_blocks + others) * tokens, head_dim),
            dtype=TORCH_DTYPE[layout.dtype],
            device=device,
        )
        decoding = [SequenceSpan(1, 0, [chunk_blocks + row]) for row in range(others)]
        spans = [SequenceSpan(chunk_tokens, 0, range(chunk_blocks)), *decoding]
        ids = [[0] * span.query_tokens for span in spans]
        batch = Batch.build(spans, ids, block_tokens=tokens, device=device)
        self._decoder.forward(batch, kv, (), self._attention)
        return kv

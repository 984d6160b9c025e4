"""Steps in which every sequence decodes: captured once for each size, then replayed.

A step of a few sequences is hundreds of small kernels; launching them takes the host longer
than the device needs to run them. A CUDA graph launches them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvstore.engine.attention import Attention
from kvstore.engine.decode_buffers import DecodeBuffers
from kvstore.engine.linear import MIN_ROWS
from kvstore.engine.model import Decoder
from kvstore.engine.sequence import TokenSequence

# Makes of a computation one that can be repeated, with the same tensors: as a graph, or as it is.
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def as_it_is(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The capture of devices that have none."""
    return compute


class GraphCapture:
    """Captures CUDA graphs, which share one pool of memory: no two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        stream: Callable[..., Any] = torch.cuda.Stream
        self._device = device
        # Not torch's own, which is on whatever device the process captured first.
        self._stream = stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # once before: libraries make their workspaces,
                compute()  # kernels are compiled and loaded, and neither can be captured
            torch.cuda.current_stream().wait_stream(self._stream)
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._stream,
                capture_error_mode="thread_local",  # other threads may go on using CUDA
            ):
                out = compute()

        def replay() -> Tensor:
            with torch.cuda.device(self._device):
                graph.replay()
            return out

        return replay


def step_sizes(max_batch: int) -> list[int]:
    """Rows of the steps that are captured: little padding, and not too many graphs."""
    sizes = [MIN_ROWS, *range(8, 64, 8), *range(64, 256, 32), *range(256, max_batch + 64, 64)]
    return [size for size, before in zip(sizes, [0, *sizes], strict=False) if before < max_batch]


class DecodeSteps:
    """One decoder's steps over one KV tensor. Belongs to the engine's loop."""

    def __init__(
        self,
        decoder: Decoder,
        kv: Tensor,
        attention: Attention,
        capture: Capture,
        *,
        max_batch: int,
        block_tokens: int,
    ) -> None:
        """Captures a step of every size: seconds, on a CUDA device."""
        sizes = step_sizes(max_batch)
        blocks = kv.shape[3] // block_tokens
        longest = -(-decoder.config.context_tokens // block_tokens)
        self._buffers = DecodeBuffers(sizes[-1], min(longest, blocks), block_tokens, decoder.device)
        self._attention = attention  # its workspace is in the graphs
        # Of all sizes, since what a graph returns can never be used by another.
        self._logits = torch.zeros((sizes[-1], decoder.config.vocab_size), device=decoder.device)
        self._steps: dict[int, Callable[[], Tensor]] = {}
        for size in reversed(sizes):  # the largest first: the others fit into its memory
            self._steps[size] = self._captured(decoder, kv, capture, size)

    def run(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Compute the next token's KV of each; logits float32 [len(sequences), vocab_size].

        They are overwritten by the next step.
        """
        size = min(size for size in self._steps if size >= len(sequences))
        self._buffers.fill(sequences)
        return self._steps[size]()[: len(sequences)]

    def _captured(
        self, decoder: Decoder, kv: Tensor, capture: Capture, size: int
    ) -> Callable[[], Tensor]:
        buffers, attention, out = self._buffers, self._attention, self._logits[:size]

        @torch.inference_mode()
        def compute() -> Tensor:
            return buffers.in_order(decoder.decode(buffers.rows(size), kv, attention), out)

        return capture(compute)

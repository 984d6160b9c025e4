"""The CPU in place of a GPU: kernels are emulated, and streams run one after the other.

What it measures says nothing; that it can be measured is what the tests are about.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvstore.bench.card import Work
from kvstore.engine.decode_steps import Capture, as_it_is
from kvstore.kernels.block_copies import BlockCopies
from kvstore.kernels.block_copy_cuda import KernelCopies
from kvstore.kernels.cuda_module import Runtime
from kvstore.kernels.paged_tensors import PagedTensors
from kvstore.layout import BlockLayout


class CpuCard:
    """See `kvstore.bench.card.Card`."""

    device = torch.device("cpu")

    def __init__(self, runtime: Runtime | None, free_bytes: int = 1 << 50) -> None:
        self.runtime = runtime
        self.free = free_bytes
        self.cleared = 0

    def seconds(self, work: Work) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    def seconds_at_once(self, works: Sequence[Work]) -> float:
        return sum(self.seconds(work) for work in works)

    def seconds_beside(self, work: Work, company: Sequence[Work]) -> float:
        for each in company:
            each()
        return self.seconds(work)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def pin(self, memory: memoryview) -> bool:
        return True

    def capture(self) -> Capture:
        return as_it_is

    def tier_copies(self, pages: PagedTensors, layout: BlockLayout) -> BlockCopies:
        return KernelCopies(pages, layout.block_tokens, runtime=self.runtime)

    def free_bytes(self) -> int:
        return self.free

    def clear(self) -> None:
        self.cleared += 1

    def facts(self) -> dict[str, Any]:
        return {"name": "no GPU"}

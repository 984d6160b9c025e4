"""By which way the HBM tier copies is for the device to say, not for the host that starts it."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from kvstore.bench.card import Work
from kvstore.kernels.block_copies import BlockCopies
from kvstore.kernels.block_copy_dma import fastest
from tests.bench.simulated_cuda import SimulatedCuda


class Way:
    """`BlockCopies`, of which a copy takes as long as this work."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def copy_out(self, runs: Any, buffers: Any) -> None:
        self._work()

    copy_in = copy_out


def test_how_long_the_host_prepares_a_copy_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimulatedCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    short = Way(cuda.work(host_s=2e-4, operations=1, operation_s=1e-3))
    long = Way(cuda.work(host_s=1e-6, operations=1, operation_s=1.1e-3))
    best = fastest(cast(list[BlockCopies], [long, short]), [], [])
    assert best.copies is cast(BlockCopies, short)
    assert (best.out_s, best.in_s) == pytest.approx((1e-3, 1e-3))

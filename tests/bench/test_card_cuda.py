"""The clock of a CUDA device, and all benchmarks on one, tiny."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvstore.bench.benchmark import Bench, measured
from kvstore.bench.card import CudaCard, cuda_card
from kvstore.bench.gpu import catalogue
from kvstore.bench.rows import Unmeasured
from kvstore.bench.sizes import TINY

pytestmark = pytest.mark.gpu


@pytest.fixture
def cuda() -> CudaCard:
    return cuda_card("cuda")


def _sleep(cycles: int) -> None:
    sleep: Callable[[int], None] = torch.cuda._sleep
    sleep(cycles)


def test_twice_the_work_takes_twice_the_time(cuda: CudaCard) -> None:
    once = min(cuda.seconds(lambda: _sleep(10_000_000)) for _ in range(3))
    twice = min(cuda.seconds(lambda: _sleep(20_000_000)) for _ in range(3))
    assert 1.8 < twice / once < 2.2


def test_streams_run_at_once(cuda: CudaCard) -> None:
    once = min(cuda.seconds(lambda: _sleep(10_000_000)) for _ in range(3))
    both = min(
        cuda.seconds_at_once([lambda: _sleep(10_000_000), lambda: _sleep(10_000_000)])
        for _ in range(3)
    )
    assert both < 1.5 * once


def test_company_outlasts_what_is_measured(cuda: CudaCard) -> None:
    alone = cuda.seconds(lambda: _sleep(10_000_000))
    beside = cuda.seconds_beside(lambda: _sleep(10_000_000), [lambda: _sleep(1_000_000)])
    assert beside < 2 * alone


def test_every_benchmark_runs(cuda: CudaCard, tmp_path: Path) -> None:
    bench = Bench(cuda, TINY, tmp_path)
    everything = list(measured(catalogue(TINY), bench, str))
    failed = [each for each in everything if isinstance(each, Unmeasured)]
    assert [each for each in failed if each.outcome == "failed"] == []

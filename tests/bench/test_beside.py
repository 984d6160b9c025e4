"""What is measured beside copies has them beside it all the time, or is no figure."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from kvstore.bench.card import CudaCard
from kvstore.bench.rows import NotHereError
from tests.bench.simulated_cuda import HEAD_START_S, SimulatedCuda

STEP_S = 0.017


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], tuple[SimulatedCuda, CudaCard]]:
    def make(depth: int) -> tuple[SimulatedCuda, CudaCard]:
        cuda = SimulatedCuda(depth)
        monkeypatch.setattr(torch, "cuda", cuda)
        monkeypatch.setattr(time, "perf_counter", cuda.clock)
        return cuda, CudaCard(torch.device("cuda"))

    return make


@pytest.mark.parametrize("depth", [600, 1024, 1 << 20])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("operations", [2, 512], ids=["kernel", "DMA"])
def test_copies_go_on_until_it_is_over(
    made: Callable[[int], tuple[SimulatedCuda, CudaCard]],
    operations: int,
    streams: int,
    depth: int,
) -> None:
    """Copies of a gibibyte, also where a stream takes few operations at once."""
    cuda, card = made(depth)
    copy = cuda.work(4e-6, operations, 0.0195 / operations)
    step = cuda.work(1e-3, 1, STEP_S)
    assert card.seconds_beside(step, [copy] * streams) == pytest.approx(STEP_S)
    begin_s, end_s = cuda.main.operations[-1]
    assert len(cuda.sides) == streams
    assert all(side.is_busy(begin_s, end_s) for side in cuda.sides)


def test_small_copies_go_on_as_well(
    made: Callable[[int], tuple[SimulatedCuda, CudaCard]],
) -> None:
    cuda, card = made(1024)
    copy, step = cuda.work(10e-6, 4, 50e-6), cuda.work(1e-3, 1, STEP_S)
    assert card.seconds_beside(step, [copy, copy]) == pytest.approx(STEP_S)
    assert all(side.is_busy(*cuda.main.operations[-1]) for side in cuda.sides)


@pytest.mark.parametrize(("host_s", "streams"), [(50e-6, 1), (13e-6, 2)])
def test_copies_that_are_shorter_than_their_launch(
    made: Callable[[int], tuple[SimulatedCuda, CudaCard]], host_s: float, streams: int
) -> None:
    """One host starts those of all streams."""
    cuda, card = made(1024)
    copy, step = cuda.work(host_s, 1, 25e-6), cuda.work(1e-3, 1, STEP_S)
    with pytest.raises(NotHereError, match="copies are shorter than their launch: 25 us, and"):
        card.seconds_beside(step, [copy] * streams)


def test_when_they_end_first_it_is_tried_again_with_more_in_advance(
    made: Callable[[int], tuple[SimulatedCuda, CudaCard]],
) -> None:
    """The host is away while it starts the step, for longer than the copies last at first."""
    cuda, card = made(1024)
    copy, away_s = cuda.work(4e-6, 1, 0.0195), 0.05
    taken_s = card.seconds_beside(cuda.work(away_s, 1, STEP_S), [copy])
    assert taken_s == pytest.approx(away_s - HEAD_START_S + STEP_S)
    assert all(side.is_busy(*cuda.main.operations[-1]) for side in cuda.sides)
    with pytest.raises(RuntimeError, match="ended first"):
        card.seconds_beside(cuda.work(0.2, 1, STEP_S), [copy])

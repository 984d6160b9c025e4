"""Drawing many rows at once gives what drawing them one by one on a CPU gives."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from kvstore.engine.sampling import Sampler, SamplingParams, draw_all
from kvstore.engine.sampling_device import CANDIDATES, Draw, _drawn, can_draw, draw_rows, rows_of

VOCAB = 3000


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def params_of(chance: random.Random, seed: int) -> SamplingParams:
    cuts: dict[str, Any] = {}
    if chance.random() < 0.5:
        cuts["top_k"] = chance.choice([1, 2, 40, CANDIDATES])
    if chance.random() < 0.5:
        cuts["top_p"] = chance.choice([0.01, 0.5, 0.9, 0.999])
    if chance.random() < 0.3:
        cuts["min_p"] = chance.choice([0.02, 0.3, 1.0])
    return SamplingParams(temperature=chance.choice([0.0, 0.3, 1.0]), seed=seed, **cuts)


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_many_rows_are_drawn_like_each_alone(device: torch.device, spread: float) -> None:
    chance, generator = random.Random(1), torch.Generator().manual_seed(2)
    here = 0
    for _ in range(12):
        params = [params_of(chance, seed) for seed in range(9)]
        logits = torch.randn(9, VOCAB, generator=generator) * spread
        alone = [Sampler(p, 0, [0]).draw(row) for p, row in zip(params, logits, strict=True)]
        draws = [Draw(p, Sampler(p, 0, [0]).point()) for p in params]
        got = draw_rows(draws, logits.to(device))
        for token, right, own in zip(got, alone, params, strict=True):
            if token is None:  # a flat distribution, of which the candidates have too little
                assert own.top_p > 0.4
                assert not own.top_k
            else:
                assert token == right
                here += 1
    assert here > 80


def test_rows_of_one_kind_are_drawn_without_the_others(device: torch.device) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(3)).to(device)
    for params in (
        SamplingParams(temperature=0.7, seed=1),
        SamplingParams(temperature=0.7, seed=1, top_k=5),
        SamplingParams(),
    ):
        right = [Sampler(params, 0, [0]).draw(row) for row in logits.cpu()]
        point = Sampler(params, 0, [0]).point()
        assert draw_rows([Draw(params, point)] * 3, logits) == right


def test_the_last_point_is_no_token_that_is_out(device: torch.device) -> None:
    """As near to 1 as can be: rounded up it would be behind all that are left."""
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0, 3.0]] * 2, device=device)
    point = 1 - 2.0**-53
    for params, last in (
        (SamplingParams(temperature=1, top_k=2), 0),
        (SamplingParams(temperature=1, top_p=0.8), 0),
        (SamplingParams(temperature=1, min_p=0.1), 4),
        (SamplingParams(temperature=1), 4),
    ):
        drawn = draw_rows([Draw(params, point), Draw(SamplingParams(), 0.0)], logits)
        assert drawn == [last, 4]


def test_penalties_and_very_long_cuts_are_drawn_on_the_cpu() -> None:
    assert can_draw(SamplingParams(temperature=1, top_p=0.9))
    assert not can_draw(SamplingParams(temperature=1, frequency_penalty=0.5))
    assert not can_draw(SamplingParams(temperature=1, top_k=CANDIDATES + 1))


KINDS = [
    SamplingParams(),
    SamplingParams(temperature=0.8, seed=1, top_p=0.9),
    SamplingParams(temperature=0.8, seed=2, top_k=5),
    SamplingParams(temperature=0.8, seed=3),
]


class Waits(TorchFunctionMode):
    """Notes the calls by which a host would wait for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = getattr(func, "__name__", "")
        by_list = name == "__getitem__" and isinstance(args[1], list)
        if by_list or name in {"tensor", "tolist", "item", "cpu", "nonzero", "__bool__"}:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_the_tokens_alone() -> None:
    """What goes to the device goes by `to_device`, from pinned memory."""
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(4))
    draws = [Draw(params, 0.5) for params in KINDS]
    with Waits() as waits:
        draw_rows([draws[row] for row in (2, 0, 3)], rows_of(logits, [2, 0, 3]))
        draw_rows(draws, logits)
    assert waits.seen == ["tolist", "tolist"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it is a prototype
def test_a_device_agrees_that_nothing_waits() -> None:
    logits = torch.randn(4, VOCAB, device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        _drawn([Draw(params, 0.5) for params in KINDS], rows_of(logits, range(4)))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_all_kinds_together_on_the_device() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(4))
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.8, seed=1, top_p=0.9),
        SamplingParams(temperature=0.8, seed=2, repetition_penalty=1.2),
        SamplingParams(temperature=5.0, seed=3, top_p=0.999),
    ]
    right = draw_all([Sampler(p, 0, [0]) for p in params], logits)
    assert draw_all([Sampler(p, 0, [0]) for p in params], logits.cuda()) == right

"""Sampling: cuts, penalties, seeds, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from kvstore.engine.sampling import Sampler, SamplingParams, draw_all
from kvstore.errors import RequestError

VOCAB = 1000


def logits_of(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def drawn(params: SamplingParams, logits: torch.Tensor, count: int = 2000) -> Counter[int]:
    sampler = Sampler(params, 0, [0])
    return Counter(sampler.draw(logits) for _ in range(count))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 3.0},
        {"frequency_penalty": -2.5},
        {"max_tokens": 0},
        {"seed": -1},
        {"stop": [""]},
        {"n": 0},
    ],
)
def test_wrong_values_are_refused_in_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**wrong)
    assert next(iter(wrong)) in str(caught.value) or "finite" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_stop_string_is_not_its_letters() -> None:
    assert SamplingParams(stop="END").stop == ("END",)


def test_greedy_is_argmax_also_with_a_batch() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    samplers = [Sampler(SamplingParams(), 0, [0]) for _ in range(4)]
    assert draw_all(samplers, logits) == logits.argmax(-1).tolist()


def test_draws_follow_the_probabilities() -> None:
    counts = drawn(SamplingParams(temperature=1.0, seed=3), logits_of([0.5, 0.3, 0.2]))
    for token, probability in enumerate([0.5, 0.3, 0.2]):
        assert abs(counts[token] / 2000 - probability) < 0.04


def test_temperature_sharpens_and_flattens() -> None:
    logits = logits_of([0.6, 0.4])
    cold = drawn(SamplingParams(temperature=0.2, seed=3), logits)
    hot = drawn(SamplingParams(temperature=5.0, seed=3), logits)
    assert cold[1] < 350 < 850 < hot[1]
    tiny = drawn(SamplingParams(temperature=1e-6, seed=3), logits, 50)
    assert tiny == {0: 50}


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.81}, {0, 1, 2}),
        ({"min_p": 0.35}, {0, 1, 2}),
        ({"top_k": 3, "top_p": 0.5}, {0}),
        ({"top_k": 3, "min_p": 0.55}, {0, 1}),
    ],
)
def test_cuts_keep_the_likeliest(cut: dict[str, Any], kept: set[int]) -> None:
    logits = logits_of([0.5, 0.3, 0.18, 0.02])
    assert set(drawn(SamplingParams(temperature=1.0, seed=5, **cut), logits)) == kept


def test_a_wide_nucleus_reaches_beyond_the_first_candidates() -> None:
    counts = drawn(SamplingParams(temperature=1.0, top_p=0.9, seed=5), torch.zeros(VOCAB), 20_000)
    assert 850 <= len(counts) <= 900


def test_top_p_cut_does_not_depend_on_how_many_candidates_were_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2))
    params = SamplingParams(temperature=1.0, top_p=0.6, seed=9)
    few = [Sampler(params, 0, [0]).draw(logits) for _ in range(20)]
    monkeypatch.setattr("kvstore.engine.sampling.NUCLEUS_CANDIDATES", 4)
    assert [Sampler(params, 0, [0]).draw(logits) for _ in range(20)] == few


def test_a_seed_repeats_and_siblings_differ() -> None:
    logits = torch.zeros(VOCAB)
    params = SamplingParams(temperature=1.0, seed=11)

    def run(index: int) -> list[int]:
        sampler = Sampler(params, index, [0])
        return [sampler.draw(logits) for _ in range(20)]

    assert run(0) == run(0)
    assert run(0) != run(1)
    free = SamplingParams(temperature=1.0)
    draws = {tuple(Sampler(free, 0, [0]).draw(logits) for _ in range(20)) for _ in range(3)}
    assert len(draws) == 3


def test_draws_do_not_depend_on_the_company() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4))
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(3)]
    alone = [Sampler(p, 0, [0]).draw(row) for p, row in zip(params, logits, strict=True)]
    assert draw_all([Sampler(p, 0, [0]) for p in params], logits) == alone
    mixed = [Sampler(SamplingParams(), 0, [0]), *(Sampler(p, 0, [0]) for p in params[1:])]
    assert draw_all(mixed, logits)[1:] == alone[1:]


def test_repetition_penalty_covers_prompt_and_output() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), 0, [0])
    logits = torch.tensor([3.0, 2.0, 1.6, -1.0])
    assert [sampler.draw(logits) for _ in range(3)] == [1, 2, 0]
    negative = Sampler(SamplingParams(repetition_penalty=2.0), 0, [0])
    assert negative.draw(torch.tensor([-1.0, -1.5])) == 1


def test_presence_and_frequency_penalties_cover_the_output_only() -> None:
    logits = torch.tensor([3.0, 2.5, 0.0])
    presence = Sampler(SamplingParams(presence_penalty=1.0), 0, [0])
    assert [presence.draw(logits) for _ in range(4)] == [0, 1, 0, 0]
    frequency = Sampler(SamplingParams(frequency_penalty=1.0), 0, [0])
    assert [frequency.draw(logits) for _ in range(5)] == [0, 1, 0, 1, 0]
    torch.testing.assert_close(logits, torch.tensor([3.0, 2.5, 0.0]))

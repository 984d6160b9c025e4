"""How the next token is drawn, and when a sequence ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.engine.sampling_device import Draw, can_draw, draw_rows, rows_of
from kvstore.engine.sampling_params import SamplingParams as SamplingParams

# Candidates that top-p looks at before it sorts the whole vocabulary.
NUCLEUS_CANDIDATES = 256


class Sampler:
    """Draws the tokens of one sequence. Owns its random generator and its token counts."""

    def __init__(self, params: SamplingParams, index: int, prompt: Sequence[int]) -> None:
        self.params = params
        self._prompt = prompt
        self._seen: Tensor | None = None  # [vocab] bool: in prompt or output
        self._counts: Tensor | None = None  # [vocab] float32: times in the output
        self._generator: torch.Generator | None = None
        if not params.greedy:
            self._generator = torch.Generator()
            if params.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed((params.seed + index) % 2**63)

    def point(self) -> float:
        """The next uniform draw, in [0, 1): one a token. 0 for a greedy sequence."""
        if self._generator is None:
            return 0.0
        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def draw(self, logits: Tensor, point: float | None = None) -> int:
        """The next token, given its logits `[vocab]` float32 on the CPU; they are not changed.

        `point` is what `point()` gave for it, if it was asked before.
        """
        if self.params.penalised:
            logits = self._penalise(logits)
        if self._generator is None:
            token = int(logits.argmax())
        else:
            token = self._sample(logits, self.point() if point is None else point)
        if self._counts is not None and self._seen is not None:
            self._counts[token] += 1
            self._seen[token] = True
        return token

    def _penalise(self, logits: Tensor) -> Tensor:
        params = self.params
        if self._seen is None or self._counts is None:
            self._counts = torch.zeros_like(logits)
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            self._seen[torch.tensor(self._prompt, dtype=torch.int64)] = True
        scale = params.repetition_penalty
        if scale != 1:
            less_likely = torch.where(logits > 0, logits / scale, logits * scale)
            logits = torch.where(self._seen, less_likely, logits)
        if params.frequency_penalty or params.presence_penalty:
            logits = logits - params.frequency_penalty * self._counts
            logits -= params.presence_penalty * (self._counts > 0)
        return logits

    def _sample(self, logits: Tensor, point: float) -> int:
        """A uniform draw, set against the cumulative probabilities."""
        params = self.params
        # In float64, and relative to the largest, so that a small temperature cannot overflow.
        logits = logits.double()
        weights = torch.exp((logits - logits.max()) / params.temperature)
        candidates: Tensor | None = None
        if 0 < params.top_k < len(weights):
            weights, candidates = weights.topk(params.top_k)
        if params.top_p < 1:
            weights, candidates = _nucleus(weights, candidates, params.top_p)
        if params.min_p > 0:
            weights = torch.where(weights >= params.min_p * weights.max(), weights, 0.0)
        cumulative = weights.cumsum(0)
        target = point * cumulative[-1]
        drawn = min(int(torch.searchsorted(cumulative, target, right=True)), len(weights) - 1)
        return drawn if candidates is None else int(candidates[drawn])


def _nucleus(weights: Tensor, candidates: Tensor | None, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest of the likeliest tokens whose probability together reaches `top_p`."""
    wanted = top_p * weights.sum()
    ordered = weights
    if candidates is None:
        # Sorting the whole vocabulary takes milliseconds, and is hardly ever needed.
        ordered, candidates = weights.topk(min(NUCLEUS_CANDIDATES, len(weights)))
        while ordered.sum() < wanted and len(ordered) < len(weights):
            ordered, candidates = weights.topk(min(16 * len(ordered), len(weights)))
    # A token is in when what is before it does not reach the wanted mass yet.
    kept = int((ordered.cumsum(0) - ordered < wanted).sum())
    return ordered[:kept], candidates[:kept]


def draw_all(samplers: Sequence[Sampler], logits: Tensor) -> list[int]:
    """One token for each row of `logits` `[len(samplers), vocab]`, float32, any device."""
    plain = all(sampler.params.greedy and not sampler.params.penalised for sampler in samplers)
    if plain:
        tokens: list[int] = logits.argmax(dim=-1).tolist()
        return tokens
    if logits.device.type == "cpu":
        return [sampler.draw(row) for sampler, row in zip(samplers, logits, strict=True)]
    points = [sampler.point() for sampler in samplers]
    tokens_there = _draw_there(samplers, points, logits)
    return [
        sampler.draw(logits[row].cpu(), points[row]) if token is None else token
        for row, (sampler, token) in enumerate(zip(samplers, tokens_there, strict=True))
    ]


def _draw_there(
    samplers: Sequence[Sampler], points: Sequence[float], logits: Tensor
) -> list[int | None]:
    """The tokens of those rows that can be drawn where the logits are; None for the others."""
    drawn: list[int | None] = [None] * len(samplers)
    rows = [row for row, sampler in enumerate(samplers) if can_draw(sampler.params)]
    if rows:
        draws = [Draw(samplers[row].params, points[row]) for row in rows]
        some = logits if len(rows) == len(samplers) else rows_of(logits, rows)
        for row, token in zip(rows, draw_rows(draws, some), strict=True):
            drawn[row] = token
    return drawn

"""How the next token is drawn, and when a sequence ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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

    def draw(self, logits: Tensor) -> int:
        """The next token, given its logits `[vocab]` float32 on the CPU; they are not changed."""
        if self.params.penalised:
            logits = self._penalise(logits)
        token = int(logits.argmax()) if self._generator is None else self._sample(logits)
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

    def _sample(self, logits: Tensor) -> int:
        """One uniform draw a token, set against the cumulative probabilities."""
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
        point = torch.rand((), dtype=torch.float64, generator=self._generator) * cumulative[-1]
        drawn = min(int(torch.searchsorted(cumulative, point, right=True)), len(weights) - 1)
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
    rows = logits.cpu()
    return [sampler.draw(row) for sampler, row in zip(samplers, rows, strict=True)]

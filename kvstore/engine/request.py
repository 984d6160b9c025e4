"""One request in the engine: its sequences, and how each of them is sampled and read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from kvstore.engine.output import FinishReason, Usage
from kvstore.engine.sampling import Sampler, SamplingParams
from kvstore.engine.sequence import Phase, Source, TokenSequence
from kvstore.engine.stop_text import StopText
from kvstore.engine.tokenizer import Tokenizer


class Generation:
    """The output side of one sequence: draws its tokens, makes them text, knows when to end."""

    def __init__(
        self, params: SamplingParams, index: int, prompt: list[int], tokenizer: Tokenizer
    ) -> None:
        self.sampler = Sampler(params, index, prompt)
        self.finish_reason: FinishReason | None = None
        self._text = tokenizer.stream()
        self._stop = StopText(params.stop)
        eos: Collection[int] = () if params.ignore_eos else tokenizer.eos_token_ids
        self._end_tokens = frozenset((*eos, *params.stop_token_ids))

    def push(self, token: int, *, last: bool) -> str:
        """The text that is final after `token`; `last`: there is no room for another."""
        if token in self._end_tokens:
            self.finish_reason = "stop"
            text = self._stop.push(self._text.finish())
            return text if self._stop.stopped else text + self._stop.finish()
        text = self._stop.push(self._text.push(token))
        if last and not self._stop.stopped:
            text += self._stop.push(self._text.finish())
        if self._stop.stopped:
            self.finish_reason = "stop"
        elif last:
            self.finish_reason = "length"
            text += self._stop.finish()
        return text


class Request:
    """A prompt and its n sequences, which come into being when the prompt is computed."""

    def __init__(
        self,
        leader: TokenSequence,
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        limit_tokens: int,
        arrived_s: float,
    ) -> None:
        self.request_id = leader.order[0]
        self.leader = leader
        self.sequences = [leader]
        self.limit_tokens = limit_tokens  # of one sequence: prompt and output
        self.generations = [
            Generation(params, index, leader.tokens[:], tokenizer) for index in range(params.n)
        ]
        self.arrived_s = arrived_s
        self.first_token_s = 0.0
        self.completion_tokens = 0

    @property
    def sources(self) -> Counter[Source]:
        """Where its prompt tokens came from."""
        return self.leader.sources

    @property
    def finished(self) -> bool:
        return all(generation.finish_reason for generation in self.generations)

    def unfinished(self) -> list[TokenSequence]:
        return [s for s in self.sequences if s.phase is not Phase.FINISHED]

    def usage(self, now_s: float) -> Usage:
        sources = self.sources
        return Usage(
            prompt_tokens=self.leader.prompt_tokens,
            hbm_tokens=sources["hbm"],
            ram_tokens=sources["ram"],
            nvme_tokens=sources["nvme"],
            remote_tokens=sources["remote"],
            recomputed_tokens=sources["recomputed"],
            completion_tokens=self.completion_tokens,
            ttft_s=self.first_token_s - self.arrived_s,
            total_s=now_s - self.arrived_s,
        )

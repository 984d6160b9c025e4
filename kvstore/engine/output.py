"""What the engine gives back: pieces while it generates, the whole when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

# "stop": an end token or a stop string; "length": max_tokens, or no room for more.
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Where a request's prompt tokens came from, and how long it took.

    hbm + ram + nvme + remote + recomputed = prompt tokens, always. Times count
    from the arrival of the request, before its text was made into tokens.
    """

    prompt_tokens: int
    hbm_tokens: int
    ram_tokens: int
    nvme_tokens: int
    remote_tokens: int
    recomputed_tokens: int
    completion_tokens: int
    ttft_s: float
    total_s: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one completion.

    `text` is final: it is never taken back, and may be "" while a character or a
    possible stop string is incomplete. `finish_reason` comes with the last delta
    of a completion, `usage` with the last of a request.
    """

    request_id: int
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One of the n answers. `token_ids` are all that were drawn, the end token included."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Output:
    """The answer to one prompt; the properties are those of its first completion."""

    completions: tuple[Completion, ...]
    usage: Usage

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.completions[0].finish_reason


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges, and counters since the engine was made."""

    waiting: int  # sequences that hold no blocks yet, or had to give them up
    loading: int  # hold blocks that the store is filling
    running: int
    hbm_blocks: int
    hbm_used_blocks: int
    hbm_cached_blocks: int
    preemptions: int
    counters: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def assemble(deltas: list[Delta]) -> Output:
    """The whole of a finished request, from all its deltas in order."""
    usage = deltas[-1].usage
    if usage is None:
        raise ValueError("the last delta carries no usage: the request is not finished")
    completions = []
    for index in sorted({delta.index for delta in deltas}):
        own = [delta for delta in deltas if delta.index == index]
        reason = own[-1].finish_reason
        if reason is None:
            raise ValueError(f"completion {index} is not finished")
        completions.append(
            Completion(
                index=index,
                text="".join(delta.text for delta in own),
                token_ids=tuple(token for delta in own for token in delta.token_ids),
                finish_reason=reason,
            )
        )
    return Output(tuple(completions), usage)

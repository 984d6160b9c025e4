"""What vLLM's scheduler side tells its workers, and what they tell it.

They are plain data, so that what decides and what moves KV needs no vLLM; vllm.py says to
vLLM's base classes which of theirs each one is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kvstore.hashing import Chain


@dataclass(frozen=True)
class Job:
    """Tokens `[start, stop)` of a request, to be loaded or saved.

    `chain` and `table`, the pages, begin with one and the same token of the prompt, its
    `base`-th, and tokens are counted from there. A load that takes longer than `deadline_s`
    from when the worker hears of it is no use; None where that is not known.
    """

    request_id: str
    chain: Chain
    table: list[int]
    base: int
    start: int
    stop: int
    deadline_s: float | None = None

    @property
    def blocks(self) -> int:
        """How many full blocks are to be saved."""
        return (self.stop - self.start) // self.chain.namespace.block_tokens


@dataclass
class Orders:
    """Of one step of the scheduler."""

    loads: list[Job] = field(default_factory=list)
    saves: list[Job] = field(default_factory=list)
    # Finished requests whose pages are kept until their saves are done.
    held: set[str] = field(default_factory=set)
    # Their pages go to others in this step.
    preempted: set[str] = field(default_factory=set)
    step: int = 0  # its number; 0 where that is of no interest
    # Nothing is computed in it, or a request waits for an answer of the store.
    is_idle: bool = False
    is_looking_up: bool = False


@dataclass
class Done:
    """What workers have done since they said so last; of several, all together."""

    step: int = 0  # the number of the step that has ended, if it has one
    saves: Counter[str] = field(default_factory=Counter)  # saves that have ended, by request
    dropped: dict[str, int] = field(default_factory=dict)  # the first token that was not saved
    failed_loads: set[str] = field(default_factory=set)

    def drop(self, request_id: str, token: int) -> None:
        """What begins with this token has not been saved."""
        self.dropped[request_id] = min(token, self.dropped.get(request_id, token))

    def aggregate(self, other: Done) -> Done:
        both = Done(
            max(self.step, other.step),
            self.saves + other.saves,
            dict(self.dropped),
            self.failed_loads | other.failed_loads,
        )
        for request_id, token in other.dropped.items():
            both.drop(request_id, token)
        return both

    def __bool__(self) -> bool:
        return bool(self.step or self.saves or self.dropped or self.failed_loads)


@dataclass(frozen=True)
class Ready:
    """A worker that knows how its KV is laid out, and under which namespace it stores it."""

    fingerprint: bytes


@dataclass(frozen=True)
class Refused:
    """A worker that goes without the store, and why."""

    reason: str

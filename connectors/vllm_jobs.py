"""What vLLM's scheduler side tells its workers, and what they tell it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvstore.hashing import Chain


@dataclass(frozen=True)
class Job:
    """Tokens `[start, stop)` of a request, to be loaded or saved.

    `chain` and `table`, the pages, begin with one and the same token of the prompt, and tokens
    are counted from there.
    """

    request_id: str
    chain: Chain
    table: list[int]
    start: int
    stop: int


@dataclass
class Orders(KVConnectorMetadata):  # type: ignore[misc]
    """Of one step of the scheduler."""

    loads: list[Job] = field(default_factory=list)
    saves: list[Job] = field(default_factory=list)
    # Finished requests whose pages are kept until their saves are done.
    held: set[str] = field(default_factory=set)
    # Their pages go to others in this step.
    preempted: set[str] = field(default_factory=set)
    # Nothing is computed in this step, and a request waits for an answer of the store.
    is_idle: bool = False
    is_looking_up: bool = False


@dataclass
class Done(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """How many saves of each request have ended, over all workers, and whose loads have failed."""

    saves: Counter[str] = field(default_factory=Counter)
    failed_loads: set[str] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Done:
        return Done(self.saves + other.saves, self.failed_loads | other.failed_loads)


@dataclass
class Ready(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """A worker that knows how its KV is laid out, and under which namespace it stores it."""

    fingerprint: bytes

"""How long and how firmly a caller asks for blocks to be kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvstore.errors import RequestError

DEFAULT_PRIORITY = 35
MAX_PRIORITY = 100


@dataclass(frozen=True, slots=True)
class Retention:
    """`priority` 0-100; after `ttl_s` (None: never) it falls back to the default.

    The clock of `ttl_s` starts when the last lease or reservation of a block is
    released, and again at every later release.
    """

    priority: int = DEFAULT_PRIORITY
    ttl_s: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.priority <= MAX_PRIORITY:
            raise RequestError(f"retention priority {self.priority} is not within 0 and 100")
        if self.ttl_s is not None and not 0 < self.ttl_s < float("inf"):
            raise RequestError(f"retention ttl_s {self.ttl_s} is not a positive number of seconds")


class Retained(NamedTuple):
    """What became of a request to retain: numbers of blocks, each counted once; what was granted.

    `priority` and `ttl_s` are those of the blocks accepted and clipped.
    """

    accepted: int  # held, and now kept as asked
    clipped: int  # held and kept, but less firmly or not as long: the tenant's cap, the longest TTL
    refused: int  # held, but the namespace's budget above default priority is used up
    absent: int  # not held by any tier
    priority: int = DEFAULT_PRIORITY
    ttl_s: float | None = None


def within_budget(priority: int, wanted_bytes: list[int], protected_bytes: int, budget: int) -> int:
    """How many of the leading blocks may be raised to `priority`.

    `wanted_bytes` are the sizes of the blocks not yet above default priority,
    `protected_bytes` what the namespace holds above it already.
    """
    if priority <= DEFAULT_PRIORITY:
        return len(wanted_bytes)
    for i, nbytes in enumerate(wanted_bytes):
        protected_bytes += nbytes
        if protected_bytes > budget:
            return i
    return len(wanted_bytes)

"""What the store's asking verbs answer with: plain values, ready for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from kvstore.identity import Namespace

RAM = "ram"
NVME = "nvme"


class Probe(NamedTuple):
    """Where each block of a chain is: `tiers[i]` is "ram", "nvme" or None."""

    tiers: list[str | None]

    @property
    def prefix(self) -> int:
        """Leading blocks that are in some tier."""
        return next((i for i, tier in enumerate(self.tiers) if tier is None), len(self.tiers))


@dataclass(frozen=True)
class Explanation:
    """Why a chain is served as far as it is.

    `breaks_at` is the first block not held (None: all are), `reason` the value
    of a `Miss`. When the namespace itself is unknown, `nearest` names the known
    one that differs least and `differences` in what: field -> [asked, stored].
    """

    blocks: int
    present: int
    breaks_at: int | None
    reason: str | None
    namespace_known: bool
    nearest: str | None = None
    differences: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.breaks_at is None:
            return f"all {self.blocks} blocks are held"
        text = f"{self.present} of {self.blocks} blocks are held; block {self.breaks_at}"
        text += f" is missing: {self.reason}"
        if self.namespace_known:
            return text
        if self.nearest is None:
            return text + "; nothing was ever stored here under any namespace"
        changed = ", ".join(
            f"{name} is {asked!r} but was {stored!r}"
            for name, (asked, stored) in self.differences.items()
        )
        return text + f"; nothing is stored under this namespace, the nearest differs: {changed}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class NamespaceUsage(NamedTuple):
    """What a namespace holds, by tier; a tier that holds nothing of it is left out."""

    namespace: Namespace
    blocks: Mapping[str, int]
    nbytes: Mapping[str, int]


@dataclass(frozen=True)
class Stats:
    """Gauges and counters since `open`.

    For blocks asked of `acquire`: asked = ram hits + nvme hits + the sum of misses.
    """

    ram: Mapping[str, int]
    nvme: Mapping[str, int]
    hits: Mapping[str, int]  # blocks served, by the tier that they came from
    misses: Mapping[str, int]  # blocks not served, by reason
    counters: Mapping[str, int]
    queues: Mapping[str, int] = field(default_factory=dict)  # what waits; empty without NVMe

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

"""What of a chain is where, and why the rest is nowhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore.answers import NVME, RAM, Explanation, Probe
from kvstore.below import Below
from kvstore.hashing import Chain, Key
from kvstore.hub import Hub
from kvstore.identity import Namespace
from kvstore.policy import Rows
from kvstore.tier import Miss


class Lookup:
    """Questions about chains that change nothing. `_locked` ones want the hub's lock."""

    def __init__(self, hub: Hub, below: Below | None) -> None:
        self._hub = hub
        self._below = below

    def probe_locked(self, chain: Chain) -> Probe:
        rows = self._hub.slots.find(chain.keys)
        if None not in rows:
            return Probe([RAM] * len(rows))
        below = self.served_below_locked(chain)
        return Probe(
            [
                RAM if row is not None else NVME if there else None
                for row, there in zip(rows, below, strict=True)
            ]
        )

    def explain_locked(self, chain: Chain) -> Explanation:
        """Without the nearest namespace, where the chain's own is not known."""
        probe = self.probe_locked(chain)
        present, prefix = len(chain) - probe.tiers.count(None), probe.prefix
        known = chain.namespace.fingerprint in self.namespaces_locked()
        if prefix == len(chain):
            return Explanation(len(chain), present, None, None, known)
        reason = self.why_absent_locked(chain.keys[prefix])
        return Explanation(len(chain), present, prefix, reason.value, known)

    def namespaces_locked(self) -> dict[bytes, Namespace]:
        """Every namespace of which blocks were stored here, by fingerprint."""
        known = dict(self._hub.namespaces)
        if self._below is not None:
            known.update(self._below.namespaces())
        return known

    def identical_locked(self, chain: Chain) -> tuple[list[int | None], Rows, Miss | None]:
        """Rows of the chain's resident blocks; up to the first that is not what it is asked as.

        Once block by block, and once without what is not there.

        Keys hash the namespace, so this bites only when a caller mixes up its
        chains; what it protects is worth the few microseconds.
        """
        slots = self._hub.slots
        found = slots.find(chain.keys)
        held: Sequence[int] = range(len(found))
        try:
            rows = np.array(found, dtype=np.int64)
        except TypeError:  # some are not there
            held = [i for i, row in enumerate(found) if row is not None]
            rows = np.array([found[i] for i in held], dtype=np.int64)
        same = slots.index.namespace[rows] == slots.namespace_id(chain.namespace.fingerprint)
        same &= slots.index.nbytes[rows] == chain.namespace.layout.block_bytes
        if same.all():
            return found, rows, None
        first = int(np.argmin(same))
        return found[: held[first]], rows[:first], Miss.IDENTITY

    def prefix_locked(self, chain: Chain, found: list[int | None]) -> int:
        """How many leading blocks are in RAM, on their way there, or would come from below."""
        fills = {} if self._below is None else self._below.promotions.fills
        there = self.served_below_locked(chain)
        return next(
            (
                i
                for i, row in enumerate(found)
                if row is None and not there[i] and chain.keys[i] not in fills
            ),
            len(found),
        )

    def missing_locked(self, chain: Chain, found: list[int | None]) -> list[int]:
        """Positions of blocks that are neither in RAM nor on their way; of equal keys the first."""
        fills = {} if self._below is None else self._below.promotions.fills
        if not fills and found.count(None) == len(found) == len(set(chain.keys)):
            return list(range(len(found)))
        missing: dict[Key, int] = {}
        for i, row in enumerate(found):
            if row is None and chain.keys[i] not in fills:
                missing.setdefault(chain.keys[i], i)
        return list(missing.values())

    def served_below_locked(self, chain: Chain) -> list[bool]:
        """Which blocks the lower tier would serve now."""
        if self._below is None:
            return [False] * len(chain)
        return self._below.serves_locked(chain.keys)

    def why_absent_locked(self, key: Key) -> Miss:
        """The reason why a block is not to be had now."""
        hub, below = self._hub, self._below
        lower = Miss.ABSENT if below is None else below.why_absent_locked(key)
        if lower is Miss.BREAKER:
            return lower
        if key in hub.damaged:
            return Miss.CHECKSUM
        return Miss.EVICTED if hub.slots.was_evicted(key) else lower

"""The lower tier as the store sees it: there or not, well or failing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstore.background import BackgroundLoop
from kvstore.demotion import Demotions
from kvstore.errands import Errands
from kvstore.hashing import Key
from kvstore.hub import Hub
from kvstore.identity import Namespace
from kvstore.promotion import Promotions
from kvstore.tier import LocalTier, Miss
from kvstore.transfer import Transfers


class Below:
    """One lower tier with what moves blocks to and from it. Guarded by the hub's lock."""

    def __init__(self, hub: Hub, tier: LocalTier, loop: BackgroundLoop) -> None:
        self._hub = hub
        self.tier = tier
        self.transfers = Transfers(tier, hub.clock, hub.bounds.transfer_deadline_s)
        self.errands = Errands(hub, tier, loop, self.transfers)
        self.promotions = Promotions(hub, tier, loop, self.transfers)
        self.demotions = Demotions(hub, tier, loop, self.transfers, self.errands)
        self.errands.on_deleted = self.demotions.start_locked

    @property
    def idle(self) -> bool:
        """Whether nothing moves, but for calls that were given up."""
        return self.demotions.idle and self.errands.idle and not self.promotions.fills

    def holds_locked(self, keys: Sequence[Key]) -> list[bool]:
        """Which blocks the tier has, whether or not it answers."""
        held = self.tier.peek(keys)
        hidden = self.errands.hidden
        if hidden:
            return [there and key not in hidden for there, key in zip(held, keys, strict=True)]
        return held

    def serves_locked(self, keys: Sequence[Key]) -> list[bool]:
        """Which blocks the tier would serve now: none while it keeps failing."""
        return self.holds_locked(keys) if self.transfers.allows() else [False] * len(keys)

    def why_absent_locked(self, key: Key) -> Miss:
        """The reason why a block that RAM does not hold is not to be had here either."""
        if self.holds_locked([key]) == [True] and not self.transfers.allows():
            return Miss.BREAKER
        return Miss.EVICTED if self.tier.was_evicted(key) else Miss.ABSENT

    def namespaces(self) -> Mapping[bytes, Namespace]:
        return self.tier.namespaces()

    def touch_used(self) -> None:
        """Tell the tier what RAM has served since, so that it keeps what is hot above it."""
        used = self._hub.used
        while used:
            try:
                keys = used.popleft()
            except IndexError:  # another thread took the last one
                return
            self.tier.touch(keys)

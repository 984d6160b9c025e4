"""The lower tier as the store sees it: there or not, well or failing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from kvstore.background import BackgroundLoop
from kvstore.breaker import Breaker
from kvstore.demotion import Demotions
from kvstore.hashing import Key
from kvstore.hub import Hub
from kvstore.identity import Namespace
from kvstore.promotion import Promotions
from kvstore.tier import LocalTier, Miss

log = logging.getLogger(__name__)


class Below:
    """One lower tier with what moves blocks to and from it. Guarded by the hub's lock."""

    def __init__(self, hub: Hub, tier: LocalTier, loop: BackgroundLoop) -> None:
        self._hub = hub
        self._loop = loop
        self._breaker = Breaker()
        self._deleting: set[Key] = set()  # evicted by the caller, not yet deleted in the tier
        self.tier = tier
        self.promotions = Promotions(hub, tier, loop, self._breaker)
        self.demotions = Demotions(hub, tier, loop, self._breaker)

    def peek_locked(self, keys: Sequence[Key]) -> list[bool]:
        """Which blocks the tier would serve now: none while it keeps failing."""
        if not self._answers():
            return [False] * len(keys)
        held = self.tier.peek(keys)
        if self._deleting:
            return [
                there and key not in self._deleting for there, key in zip(held, keys, strict=True)
            ]
        return held

    def why_absent(self, key: Key) -> Miss:
        """The reason why a block that RAM does not hold is not to be had here either."""
        if not self._answers():
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

    def delete_locked(self, keys: Sequence[Key]) -> None:
        """Not found from now on; deleted in the background."""
        if keys:
            self._deleting.update(keys)
            self._loop.spawn(self._delete(list(keys)))

    def retain(self, keys: Sequence[Key], priority: int, expires_s: float) -> None:
        """Pass a retention on, in the background."""
        if keys:
            self._loop.spawn(self._retain(list(keys), priority, expires_s))

    def _answers(self) -> bool:
        return self._breaker.allows(self._hub.clock.monotonic_s())

    async def _delete(self, keys: list[Key]) -> None:
        try:
            await self.tier.delete(keys)
        except Exception as error:
            log.warning("deleting %d blocks from %s: %s", len(keys), self.tier.name, error)
        finally:
            with self._hub.lock:
                self._deleting.difference_update(keys)

    async def _retain(self, keys: list[Key], priority: int, expires_s: float) -> None:
        try:
            await self.tier.retain(keys, priority, expires_s)
        except Exception as error:
            log.warning("retaining %d blocks in %s: %s", len(keys), self.tier.name, error)

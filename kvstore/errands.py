"""What the lower tier is told besides blocks: which to drop, and which to keep how firmly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

from kvstore.background import BackgroundLoop
from kvstore.hashing import Key
from kvstore.hub import Hub
from kvstore.tier import LocalTier
from kvstore.transfer import Transfers

Claim = tuple[int, float]  # priority, expires_s


class Errands:
    """Deletes and retentions, passed on in the background by one worker.

    What waits is one entry a block, so there is never more of it than the tier
    has blocks. Guarded by the hub's lock.
    """

    def __init__(
        self, hub: Hub, tier: LocalTier, loop: BackgroundLoop, transfers: Transfers
    ) -> None:
        self._hub = hub
        self._tier = tier
        self._loop = loop
        self._transfers = transfers
        self._deletes: set[Key] = set()
        self._claims: dict[Key, Claim] = {}
        self._is_working = False
        self.hidden: set[Key] = set()  # evicted by the caller, perhaps still in the tier
        self.on_deleted: Callable[[], None] = lambda: None  # lock held; keys may be written again

    @property
    def idle(self) -> bool:
        return not self._is_working

    def hide_locked(self, keys: Sequence[Key]) -> None:
        """Not found from now on. `delete_locked` must follow."""
        self.hidden.update(keys)

    def delete_locked(self, keys: Sequence[Key]) -> None:
        """Not found from now on, and soon not there. What cannot be deleted is found again."""
        self.hidden.update(keys)
        self._deletes.update(keys)
        self._start_locked()

    def retain_locked(self, keys: Sequence[Key], priority: int, expires_s: float) -> None:
        """The tier should keep these blocks so firmly, for so long. The last word counts."""
        self._claims.update(dict.fromkeys(keys, (priority, expires_s)))
        self._start_locked()

    def _start_locked(self) -> None:
        if not self._is_working and (self._deletes or self._claims):
            self._is_working = True
            self._loop.spawn(self._work())

    async def _work(self) -> None:
        while True:
            with self._hub.lock:
                deletes, self._deletes = list(self._deletes), set()
                claims, self._claims = self._claims, {}
                if not deletes and not claims:
                    self._is_working = False
                    self._hub.notify_locked()
                    return
            if deletes:
                await self._transfers.run(
                    partial(self._tier.delete, deletes), partial(self._deleted, deletes)
                )
            alike: defaultdict[Claim, list[Key]] = defaultdict(list)
            for key, claim in claims.items():
                alike[claim].append(key)
            for (priority, expires_s), keys in alike.items():
                await self._transfers.run(
                    partial(self._tier.retain, keys, priority, expires_s),
                    partial(self._retained, keys),
                )

    def _deleted(self, keys: list[Key], count: int | None) -> None:
        with self._hub.lock:
            self.hidden.difference_update(keys)
            if count is None:
                self._hub.counters["evictions_failed_blocks"] += len(keys)
            self.on_deleted()

    def _retained(self, keys: list[Key], count: int | None) -> None:
        if count is None:
            with self._hub.lock:
                self._hub.counters["retentions_failed_blocks"] += len(keys)

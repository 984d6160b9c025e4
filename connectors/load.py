"""Blocks on their way from a store into an engine's pages."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.connectors.accounts import Accounts, Usage, usage_of
from kvstore.connectors.convert import Pages
from kvstore.connectors.shards import Run
from kvstore.errors import LayoutError
from kvstore.tier import Miss
from kvstore.verbs import Lease


class Target(NamedTuple):
    """Where blocks go: tokens `wanted` of a sequence of `prompt_tokens`, into its `table`'s pages.

    `wanted.start` tokens are the engine's already.
    """

    pages: Pages
    table: Sequence[int]
    wanted: range
    block_tokens: int
    prompt_tokens: int


class Leg(NamedTuple):
    """A run of blocks and a lease for each of its shards."""

    run: Run
    leases: list[Lease]

    def ready(self) -> int:
        return min(lease.ready() for lease in self.leases)

    def shortest(self) -> Lease:
        """The lease that ends first: what the leg can give in the end."""
        return min(self.leases, key=len)

    def release(self) -> None:
        for lease in self.leases:
            lease.release()


class Load:
    """What `Connector.load` returns: poll it or wait for it; it always ends by its deadline.

    Blocks are copied, in order, by the thread that polls or waits. A load that is dropped gives
    its leases back. Safe to use from several threads.
    """

    def __init__(
        self, target: Target, legs: Sequence[Leg], miss: Miss | None, accounts: Accounts
    ) -> None:
        """`miss` is why what is wanted after the last leg is not served, None if nothing is."""
        self._target = target
        self._legs = list(legs)
        self._after = miss
        self._accounts = accounts
        self._turn = threading.Lock()
        self._done = 0  # blocks copied of the first leg
        self._loaded: Counter[str] = Counter()  # tokens by tier
        self._blocks = 0  # loaded
        self._miss: Miss | None = None
        self._ended = False
        if not self._legs:
            self._end(miss)

    @property
    def is_done(self) -> bool:
        """Whether nothing more will be written to the pages."""
        return self._ended

    def poll(self) -> bool:
        """Copy what has arrived, without waiting for more; True when the load has ended."""
        with self._turn:
            try:
                while not self._ended:
                    if not self._legs:
                        self._end(self._after)
                    elif not self._advance(self._legs[0]):
                        return False
            except LayoutError:
                self._end(Miss.IDENTITY)
                raise
            except Exception as error:
                self._accounts.store_failed("load", error)
                self._end(Miss.BREAKER)
            return True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the load has ended, or for `timeout_s`; True when it has ended."""
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.poll():
            left_s = None if until_s is None else until_s - time.monotonic()
            if left_s is not None and left_s <= 0:
                return False
            try:
                done, leases = self._done, self._legs[0].leases
                for lease in leases:
                    lease.wait(done + 1, left_s)
            except IndexError:  # another thread has ended it
                continue
            except Exception as error:
                self._accounts.store_failed("load", error)
                self.cancel(Miss.BREAKER)
        return True

    def cancel(self, reason: Miss = Miss.TOO_SLOW) -> None:
        """End now: when this returns, nothing more is written to the pages."""
        with self._turn:
            if not self._ended:
                self._end(reason)

    # ---- what became of it; final when `is_done`

    @property
    def loaded_tokens(self) -> range:
        """The tokens that are in the pages now: from the first that was wanted."""
        start = self._target.wanted.start
        return range(start, start + self._loaded.total())

    @property
    def outcomes(self) -> list[Miss | None]:
        """For each store block asked for: None when it was loaded, or why not."""
        target = self._target
        if not target.wanted:
            return []
        first = target.wanted.start // target.block_tokens
        asked = -(-target.wanted.stop // target.block_tokens) - first
        return [None if i < self._blocks else self._miss for i in range(asked)]

    @property
    def failed_pages(self) -> set[int]:
        """Physical blocks of the engine whose wanted tokens were not all loaded."""
        target, size = self._target, self._target.pages.layout.block_tokens
        missing = range(self.loaded_tokens.stop, target.wanted.stop)
        if not missing:
            return set()
        return set(target.table[missing.start // size : -(-missing.stop // size)])

    @property
    def usage(self) -> Usage:
        """Of the whole prompt, as if what was not loaded is recomputed."""
        return usage_of(self._target.prompt_tokens, self._target.wanted.start, self._loaded)

    # ---- inside; `_turn` held

    def _advance(self, leg: Leg) -> bool:
        """Copy what is ready of the first leg; True when it is over."""
        ready = leg.ready()
        if ready > self._done:
            self._copy(leg, self._done, ready)
        shortest = leg.shortest()
        if self._done < len(shortest):
            return False
        if self._done < leg.run.stop - leg.run.start:
            self._end(shortest.miss or Miss.ABSENT)
            return True
        self._legs.pop(0)
        self._done = 0
        leg.release()
        return True

    def _copy(self, leg: Leg, start: int, stop: int) -> None:
        target, size = self._target, self._target.block_tokens
        first = (leg.run.start + start) * size
        for shard, lease in zip(leg.run.shards, leg.leases, strict=True):
            target.pages.copy_in(
                target.table, first, lease.views[start:stop], size, shard, target.wanted
            )
        for i in range(start, stop):
            sources = {lease.sources[i] for lease in leg.leases}
            coldest = next((source for source in sources if source != "ram"), "ram")
            token = (leg.run.start + i) * size
            tokens = range(max(token, target.wanted.start), min(token + size, target.wanted.stop))
            self._loaded[coldest] += len(tokens)
        self._done = stop
        self._blocks += stop - start

    def _end(self, miss: Miss | None) -> None:
        self._ended = True
        self._miss = miss
        for leg in self._legs:
            leg.release()
        self._legs.clear()
        self._accounts.loaded(self.usage, self._blocks)
        self._accounts.missed(len(self.outcomes) - self._blocks, miss)

"""The engine's side of the store: full blocks go out as they fill, known ones come in.

Nothing here waits for the store except `wait`, which the engine calls when it
has nothing else to do. Whatever the store does, short of returning wrong bytes,
costs hits and nothing more: an exception is counted and logged, and the
sequence goes on without the store.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import cast

from kvstore.engine.scheduler import Scheduler
from kvstore.engine.sequence import Phase, Source, TokenSequence
from kvstore.planner import LinearCost, plan_load
from kvstore.tiers.hbm import HbmTier
from kvstore.verbs import Lease, Store

# What is copied in at most between two steps while others decode: a few milliseconds.
STEP_COPY_BYTES = 32 << 20
# How long `wait` waits for the next block before it looks at everything again.
WAIT_S = 0.05

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Load:
    """A sequence that a lease is filling, from block `start` on."""

    sequence: TokenSequence
    lease: Lease
    start: int

    @property
    def done(self) -> int:
        """Blocks of the lease that are in HBM."""
        return self.sequence.computed_blocks - self.start


class Offload:
    """Moves the blocks of one engine between HBM and a store. Belongs to the engine's loop.

    `prefill` is the engine's measured speed of computing, set against the
    store's measured speed of loading.
    """

    def __init__(
        self, store: Store, hbm: HbmTier, scheduler: Scheduler, prefill: LinearCost
    ) -> None:
        self._store = store
        self._hbm = hbm
        self._scheduler = scheduler
        self._prefill = prefill
        self._loads: list[Load] = []  # oldest first
        self.counters: Counter[str] = Counter()

    @property
    def loading(self) -> bool:
        return bool(self._loads)

    def offer(self, sequence: TokenSequence) -> None:
        """Give the store the blocks of `sequence` that have become full. Copies, does not wait.

        A block is offered once. Where the store has no room it is not taken.
        """
        start, stop = sequence.offered_blocks, sequence.computed_blocks
        if start >= stop:
            return
        sequence.offered_blocks = stop
        with self._guarded("offer"):
            chain = sequence.chain.chain(start, stop)
            with self._store.reserve(chain) as reservation:
                if not reservation.indices:
                    return
                table = sequence.block_table
                blocks = [table[start + index] for index in reservation.indices]
                self._hbm.write_out(blocks, reservation.views)
                reservation.commit()
                self.counters["offloaded_blocks"] += len(blocks)

    def demote(self, sequence: TokenSequence) -> None:
        """`sequence` is about to lose its blocks: see that the store has them."""
        self.cancel(sequence)
        with self._guarded("demote"):
            held = self._store.probe(sequence.chain.chain(0, sequence.computed_blocks)).prefix
            sequence.offered_blocks = min(sequence.offered_blocks, held)
        self.offer(sequence)

    def prefetch(self, waiting: Iterable[TokenSequence]) -> None:
        """Have the store bring into RAM what these sequences will want, once for each."""
        for sequence in waiting:
            if sequence.prefetched:
                continue
            sequence.prefetched = True
            chain = sequence.next_blocks()
            here = len(self._hbm.pool.find(chain.keys))
            if here < len(chain):
                with self._guarded("prefetch"):
                    self.counters["prefetched_blocks"] += self._store.prefetch(chain.slice(here))

    def begin(self, sequence: TokenSequence) -> None:
        """Ask for what the store has and what is worth loading; LOADING until `poll` is done."""
        chain = sequence.next_blocks()
        # What HBM knew came from the store, or was offered to it, when it was new.
        sequence.offered_blocks = max(sequence.offered_blocks, sequence.computed_blocks)
        if not chain:
            return
        with self._guarded("load"):
            probe = self._store.probe(chain)
            sources = [tier for tier in probe.tiers[: probe.prefix] if tier is not None]
            plan = plan_load(
                sources,
                chain.namespace.layout.block_bytes,
                sequence.block_tokens,
                sequence.computed_tokens,
                len(sequence.tokens),
                self._store.load_costs,
                self._prefill,
                self._store.queued_bytes(),
            )
            if plan.blocks < len(sources):
                self.counters["too_slow_blocks"] += len(sources) - plan.blocks
                chain = chain.slice(0, plan.blocks)
            if not chain:
                return
            # Also where the probe saw nothing: the store counts its misses, with their reasons.
            lease = self._store.acquire(chain, deadline_s=plan.deadline_s)
            self._loads.append(Load(sequence, lease, sequence.computed_blocks))
            sequence.phase = Phase.LOADING

    def poll(self, *, others_run: bool) -> None:
        """Copy what has arrived; a sequence whose lease has ended is RUNNING again."""
        block_bytes = self._hbm.layout.block_bytes
        budget = max(1, STEP_COPY_BYTES // block_bytes) if others_run else self._hbm.pool.blocks
        for load in self._loads.copy():
            self._scheduler.catch_up(load.sequence)
            sources: list[str] = []
            ended = True  # unless the lease can say otherwise
            with self._guarded("load"):
                sources = self._copy(load, budget)
                ended = load.done + len(sources) >= len(load.lease)
            self._arrived(load.sequence, sources)
            budget -= len(sources)
            if ended:
                self._end(load)

    def wait(self) -> None:
        """Block until something arrives for the oldest load, for a moment at most."""
        if self._loads:
            load = self._loads[0]
            with self._guarded("wait"):
                load.lease.wait(load.done + 1, WAIT_S)

    def cancel(self, sequence: TokenSequence) -> None:
        """Stop loading `sequence`, if it is being loaded."""
        for load in self._loads.copy():
            if load.sequence is sequence:
                self._end(load)

    def close(self) -> None:
        for load in self._loads.copy():
            self._end(load)

    def _copy(self, load: Load, budget: int) -> list[str]:
        """Copy ready blocks of a lease to HBM, at most `budget`; returns where each came from."""
        done = load.done
        ready = min(load.lease.ready(), done + budget)
        if ready <= done:
            return []
        blocks = load.sequence.block_table[load.start + done : load.start + ready]
        self._hbm.read_in(blocks, load.lease.views[done:ready])
        return load.lease.sources[done:ready]

    def _arrived(self, sequence: TokenSequence, sources: list[str]) -> None:
        for source, run in groupby(sources):
            tokens = len(list(run)) * sequence.block_tokens
            sequence.advance(tokens, cast(Source, source))
            self._scheduler.name_blocks(sequence, tokens)
        sequence.offered_blocks = max(sequence.offered_blocks, sequence.computed_blocks)
        self.counters["loaded_blocks"] += len(sources)

    def _end(self, load: Load) -> None:
        self._loads.remove(load)
        if load.sequence.phase is Phase.LOADING:
            load.sequence.phase = Phase.RUNNING
        with self._guarded("release"):
            load.lease.release()

    @contextmanager
    def _guarded(self, action: str) -> Iterator[None]:
        """The store must never fail a request: count what it raises, and go on."""
        try:
            yield
        except Exception as error:
            self.counters["store_errors"] += 1
            level = logging.WARNING if self.counters["store_errors"] == 1 else logging.DEBUG
            # Its text: a log that keeps an error keeps its frames, and their buffers.
            text = repr(error)
            log.log(level, "the store failed (%s), going on without it: %s", action, text)

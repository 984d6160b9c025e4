"""The engine's side of the store: full blocks go out as they fill, known ones come in.

Nothing here waits, for the store or for a copy, except `wait` and `settle`, which the engine
calls when it has nothing else to do. Whatever the store does, short of returning wrong
bytes, costs hits and nothing more: an exception is counted and logged, and the sequence
goes on without the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from kvstore.engine.arrivals import Arrivals
from kvstore.engine.departures import Departures
from kvstore.engine.guard import Guard
from kvstore.engine.scheduler import Scheduler
from kvstore.engine.sequence import TokenSequence
from kvstore.hashing import Chain
from kvstore.planner import LinearCost, Meeting, plan_load
from kvstore.tiers.hbm import HbmTier
from kvstore.tiers.hbm_copies import Gates
from kvstore.verbs import Store


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
        self._guarded = Guard()
        self._departures = Departures(store, hbm, self._guarded)
        self._arrivals = Arrivals(hbm, scheduler, self._guarded)

    @property
    def counters(self) -> Counter[str]:
        return self._guarded.counters

    @property
    def copying(self) -> bool:
        """Whether copies are on their way for which no sequence waits."""
        return bool(self._departures) or self._arrivals.copying

    def offer(self, sequences: Iterable[TokenSequence]) -> None:
        """Give the store the blocks of `sequences` that have become full.

        Full once the device has computed what it was told to: copies come after that. What
        was copied meanwhile is committed.
        """
        self._departures.poll()
        self._departures.offer(sequences)

    def demote(self, sequence: TokenSequence) -> None:
        """`sequence` is about to lose its blocks: see that the store has them."""
        self._arrivals.cancel(sequence)
        table, count = sequence.block_table, sequence.computed_blocks
        with self._guarded("demote"):
            tiers = self._store.probe(sequence.chain.chain(0, count)).tiers
            is_held = self._hbm.pool.is_held
            # A held block is on its way to the store, or has just come from there.
            lost = (i for i in range(count) if tiers[i] is None and not is_held(table[i]))
            sequence.offered_blocks = min(sequence.offered_blocks, next(lost, count))
        if not self._arrivals.gated_blocks.isdisjoint(table[sequence.offered_blocks : count]):
            return  # not even there yet: the store that had them has been replaced
        self.offer([sequence])

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
        """Ask for what the store has and what is worth loading; LOADING until `poll` is done.

        Where nobody else has anything to compute, some of it may be computed while the rest comes.
        """
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
            if plan.meeting is not None and self._scheduler.is_alone(sequence):
                self._meet(sequence, chain, plan.meeting)
                return
            if plan.blocks < len(sources):
                self.counters["too_slow_blocks"] += len(sources) - plan.blocks
                chain = chain.slice(0, plan.blocks)
            if not chain:
                return
            # Also where the probe saw nothing: the store counts its misses, with their reasons.
            lease = self._store.acquire(chain, deadline_s=plan.deadline_s)
            self._arrivals.begin(sequence, lease, sequence.computed_blocks)

    def _meet(self, sequence: TokenSequence, chain: Chain, meeting: Meeting) -> None:
        """Load what is before the blocks to be computed, and what is after them."""
        computed, deadline_s = meeting
        for part in (slice(0, computed.start), slice(computed.stop, None)):
            start, stop, _ = part.indices(len(chain))
            if start < stop:
                lease = self._store.acquire(chain.slice(start, stop), deadline_s=deadline_s)
                self._arrivals.begin(sequence, lease, sequence.computed_blocks + start)
        self.counters["met_blocks"] += len(computed)

    def poll(self, *, others_run: bool) -> None:
        """Go on with what was copied to HBM meanwhile, and copy what is ready."""
        self._arrivals.poll(others_run=others_run)

    def take_gates(self) -> list[Gates]:
        """What the next forward pass has to wait for, layer by layer."""
        return self._arrivals.take_gates()

    def wait(self) -> None:
        """Block until a copy is over or something can be loaded, for a moment at most."""
        if self._departures:
            self._departures.wait()
        elif self._arrivals.copying:
            self._arrivals.wait_for_copies()
        else:
            self._arrivals.wait()

    def settle(self) -> None:
        """Block until the copies are over for which no sequence waits. Milliseconds."""
        while self._departures:
            self._departures.wait()
        self._arrivals.wait_for_copies()

    def cancel(self, sequence: TokenSequence) -> None:
        """Stop loading `sequence`, if it is being loaded."""
        self._arrivals.cancel(sequence)

    def close(self) -> None:
        self._arrivals.close()
        self.settle()

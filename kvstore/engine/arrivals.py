"""Blocks on their way from the store to HBM.

A lease is filled by the store; what is ready of it is copied into the sequence's blocks. Nobody
may read these before their copy is over, so they have no key until then, and of the sequence
only what lies before them is computed. Except where the copy is made layer by layer: then the
sequence runs at once, and the forward pass waits before each layer for that layer of the blocks
alone (`take_gates`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import groupby
from typing import cast

from kvstore.engine.guard import Guard
from kvstore.engine.scheduler import Scheduler
from kvstore.engine.sequence import Phase, Source, TokenSequence
from kvstore.tiers.hbm import HbmTier
from kvstore.tiers.hbm_copies import UNBOUNDED, Gates
from kvstore.verbs import Lease

# How long `wait` waits for the next block before it looks at everything again.
WAIT_S = 0.05


@dataclass(eq=False, slots=True)
class _Arrival:
    """A copy into the blocks of a sequence from block `first` on."""

    first: int
    blocks: list[int]
    sources: list[str]
    views: list[memoryview]  # kept: what is copied from must not be unmapped meanwhile
    events: Gates  # one, or one a layer

    @property
    def stop(self) -> int:
        return self.first + len(self.blocks)

    @property
    def is_over(self) -> bool:
        return self.events[-1].done()


@dataclass(eq=False, slots=True)
class _Load:
    """A sequence that a lease is filling, from block `start` on. It may have others."""

    sequence: TokenSequence
    lease: Lease
    start: int
    asked: int = 0  # blocks of the lease whose copy was started, or that others have brought
    arrivals: deque[_Arrival] = field(default_factory=deque)  # oldest first

    @property
    def done(self) -> int:
        """Blocks of the lease that the sequence has reached; negative where some lack before it."""
        return self.sequence.computed_blocks - self.start


class Arrivals:
    """Copies in, and the leases that they read. Belongs to the engine's loop."""

    def __init__(self, hbm: HbmTier, scheduler: Scheduler, guard: Guard) -> None:
        self._hbm = hbm
        self._scheduler = scheduler
        self._guard = guard
        self._loads: list[_Load] = []  # oldest first
        self._parting: list[_Load] = []  # nobody waits for them any more, but for their copies
        self._gates: list[Gates] = []  # the next forward pass has to wait for them
        self.gated_blocks: set[int] = set()  # those that it will have waited for then

    @property
    def loading(self) -> bool:
        """Whether sequences wait for blocks."""
        return bool(self._loads)

    @property
    def copying(self) -> bool:
        """Whether copies are on their way for which no sequence waits."""
        return bool(self._parting)

    def begin(self, sequence: TokenSequence, lease: Lease, start: int) -> None:
        """Fill `sequence` from block `start` on; the lease is ours now.

        It is LOADING until `poll` has done with all of its leases.
        """
        self._loads.append(_Load(sequence, lease, start))
        self._see_phase(sequence)

    def poll(self, *, others_run: bool) -> None:
        """Copy what is ready; a sequence whose lease has ended is RUNNING again."""
        for load in self._parting.copy():
            self._part(load)
        budget = self._hbm.copies.step_bytes if others_run else UNBOUNDED
        blocks = max(1, budget // self._hbm.layout.block_bytes)
        for load in self._loads.copy():
            self._scheduler.catch_up(load.sequence)
            load.asked = max(load.asked, load.done)
            is_open = False  # unless the lease can say otherwise
            with self._guard("load"):
                blocks -= self._start(load, blocks, others_run)
                is_open = load.asked < len(load.lease)
            while load.done >= 0 and load.arrivals and load.arrivals[0].is_over:
                arrival = load.arrivals.popleft()
                self._hbm.pool.unhold(arrival.blocks)
                self._arrived(load.sequence, arrival)
            if not is_open and load.done >= load.asked:
                self._end(load)

    def take_gates(self) -> list[Gates]:
        """For each copy that goes layer by layer: its events, by layer. Each is given once."""
        gates, self._gates = self._gates, []
        self.gated_blocks.clear()
        return gates

    def wait(self) -> None:
        """Block until something arrives for the oldest load, for a moment at most."""
        if self._loads:
            load = self._loads[0]
            if load.arrivals:
                load.arrivals[0].events[-1].wait()
                return
            with self._guard("wait"):
                load.lease.wait(load.asked + 1, WAIT_S)

    def wait_for_copies(self) -> None:
        """Block until the copies for which no sequence waits are over."""
        for load in self._parting.copy():
            for arrival in load.arrivals:
                arrival.events[-1].wait()
            self._part(load)

    def cancel(self, sequence: TokenSequence) -> None:
        """Stop loading `sequence`, if it is being loaded."""
        for load in self._loads.copy():
            if load.sequence is sequence:
                self._end(load)

    def close(self) -> None:
        for load in self._loads.copy():
            self._end(load)
        self.wait_for_copies()

    def _start(self, load: _Load, budget: int, others_run: bool) -> int:
        """Copy ready blocks of a lease to HBM, at most `budget`; returns how many."""
        copies, layout = self._hbm.copies, self._hbm.layout
        asked = load.asked
        ready = min(load.lease.ready(), asked + budget)
        if ready <= asked:
            return 0
        first = load.start + asked
        blocks = load.sequence.block_table[first : load.start + ready]
        views, sources = list(load.lease.views[asked:ready]), load.lease.sources[asked:ready]
        # Who waits for these waits for all that were asked for before, whoever it is for; and
        # who runs at once is another from now on.
        nbytes = (self._coming() + ready - asked) * layout.block_bytes
        most = copies.gated_bytes(others_run or bool(self._gates))
        by_layer = load.done >= 0 and ready == len(load.lease) and nbytes <= most
        events: Gates
        if by_layer:
            events = copies.copy_in_by_layer(blocks, views)
        else:
            events = [copies.copy_in(blocks, views)]
        arrival = _Arrival(first, blocks, sources, views, events)
        self._hbm.pool.hold(blocks)
        load.arrivals.append(arrival)
        load.asked = ready
        if by_layer:
            self._run_at_once(load)
        return ready - asked

    def _coming(self) -> int:
        """Blocks whose copies are not over."""
        arrivals = (a for load in (*self._loads, *self._parting) for a in load.arrivals)
        return sum(len(arrival.blocks) for arrival in arrivals if not arrival.is_over)

    def _run_at_once(self, load: _Load) -> None:
        """All of a lease is on its way: who reads it waits for its copies, layer by layer.

        Copies of the load's earlier blocks end before.
        """
        for arrival in load.arrivals:
            self._arrived(load.sequence, arrival)
            self.gated_blocks.update(arrival.blocks)
        self._gates.append(load.arrivals[-1].events)

    def _arrived(self, sequence: TokenSequence, arrival: _Arrival) -> None:
        """Its blocks may be read: those that others have not brought meanwhile."""
        fresh = arrival.stop - max(arrival.first, sequence.computed_blocks)
        if fresh <= 0:
            return
        for source, run in groupby(arrival.sources[-fresh:]):
            tokens = len(list(run)) * sequence.block_tokens
            sequence.advance(tokens, cast(Source, source))
            self._scheduler.name_blocks(sequence, tokens)
        sequence.offered_blocks = max(sequence.offered_blocks, sequence.computed_blocks)
        self._guard.counters["loaded_blocks"] += fresh

    def _end(self, load: _Load) -> None:
        self._loads.remove(load)
        self._see_phase(load.sequence)
        self._parting.append(load)
        self._part(load)

    def _see_phase(self, sequence: TokenSequence) -> None:
        starts = [load.start for load in self._loads if load.sequence is sequence]
        if starts:
            sequence.phase, sequence.loading_from = Phase.LOADING, min(starts)
        elif sequence.phase is Phase.LOADING:
            sequence.phase = Phase.RUNNING

    def _part(self, load: _Load) -> None:
        """Let go of the blocks that have been copied, and when all are, of the lease."""
        while load.arrivals and load.arrivals[0].is_over:
            self._hbm.pool.unhold(load.arrivals.popleft().blocks)
        if not load.arrivals:
            self._parting.remove(load)
            with self._guard("release"):
                load.lease.release()

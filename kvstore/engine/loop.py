"""The loop under the engine: one step computes a batch, and moves blocks around it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import islice

from torch import Tensor

from kvstore.engine.device import Device, Observe
from kvstore.engine.offload import Offload
from kvstore.engine.output import Delta, EngineStats
from kvstore.engine.request import Request
from kvstore.engine.sampling import Sampler, draw_all
from kvstore.engine.sampling_device import rows_of
from kvstore.engine.scheduler import Piece, Scheduler
from kvstore.engine.sequence import Phase, TokenSequence
from kvstore.errors import InvariantError
from kvstore.planner import LinearCost
from kvstore.tiers.hbm import HbmTier
from kvstore.verbs import Store

# Waiting sequences whose blocks the store is told to bring into RAM.
LOOKAHEAD_SEQUENCES = 8


class Loop:
    """Runs requests over one HBM tier, with what computes there. Belongs to one thread."""

    def __init__(
        self,
        device: Device,
        hbm: HbmTier,
        store: Store | None,
        *,
        max_batch: int,
        chunk_tokens: int,
    ) -> None:
        self.hbm = hbm
        self.requests: dict[int, Request] = {}  # not finished, by id
        self._device = device
        self._forward = device.forward(hbm, store)
        self._prefill_cost = LinearCost()
        self._scheduler = Scheduler(
            hbm.pool, max_batch=max_batch, chunk_tokens=chunk_tokens, demote=self._demote
        )
        self._offload: Offload | None = None
        if store is not None:
            self._offload = Offload(store, hbm, self._scheduler, self._prefill_cost)
        self._counters: Counter[str] = Counter()

    @property
    def busy(self) -> bool:
        """Whether `advance` has anything to do."""
        return bool(self.requests) or (self._offload is not None and self._offload.copying)

    def settle(self) -> None:
        """See the last copies to their end, when there is nothing else to do."""
        if self._offload is not None and not self.requests:
            self._offload.settle()

    def start(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self._scheduler.add(request.leader)

    def abort(self, request_id: int) -> None:
        """Drop a request and free its blocks; nothing happens when there is none of this id."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return
        for sequence in request.unfinished():
            if self._offload is not None:
                self._offload.cancel(sequence)
            self._scheduler.remove(sequence)

    def advance(self) -> list[Delta]:
        """One step: at most one token for each sequence. Waits only when none can be computed."""
        phase = self._device.phase
        with phase("plan"):
            self._admit()
            step = self._scheduler.plan()
        if not step.pieces:
            with phase("wait"):
                if self._offload is not None:
                    self._offload.wait()
            return []
        finishing = [piece.sequence for piece in step.pieces if piece.finishes]
        gates = [] if self._offload is None else self._offload.take_gates()
        # What waits for blocks says nothing about the speed of computing.
        observe = None if gates else self._prefill_of(step.pieces)
        stop = None if observe is None else self._device.stopwatch()
        with phase("compute"):
            self.hbm.duplicate(step.copies)
            logits = self._forward(step.pieces, gates)
        with phase("offload"):  # before anything waits for the logits: the device is computing
            for piece in step.pieces:
                self._scheduler.advance(piece)
            if self._offload is not None:
                self._offload.offer(piece.sequence for piece in step.pieces)
        with phase("draw"):
            tokens = iter(self._draw(finishing, logits))
        if stop is not None and observe is not None:
            stop(observe)
        deltas = []
        for sequence in finishing:
            siblings = self._scheduler.fork(sequence)
            self.requests[sequence.order[0]].sequences += siblings
            deltas += [self._accept(s, next(tokens)) for s in (sequence, *siblings)]
        return deltas

    def stats(self) -> EngineStats:
        pool, running = self.hbm.pool, self._scheduler.running
        counters = self._counters + (Counter() if self._offload is None else self._offload.counters)
        return EngineStats(
            waiting=len(self._scheduler.waiting),
            loading=sum(s.phase is Phase.LOADING for s in running),
            running=sum(s.phase is Phase.RUNNING for s in running),
            hbm_blocks=pool.blocks,
            hbm_used_blocks=pool.used_blocks,
            hbm_cached_blocks=pool.cached_blocks,
            preemptions=self._scheduler.preemptions,
            counters=dict(counters),
        )

    def check_invariants(self) -> None:
        """Raises InvariantError where scheduler, pool and requests contradict each other."""
        self._scheduler.check_invariants()
        queued = {s.order[0] for s in (*self._scheduler.waiting, *self._scheduler.running)}
        if queued != self.requests.keys():
            raise InvariantError(f"requests {self.requests.keys() ^ queued} are lost, or undead")

    def close(self) -> None:
        """Abort all requests and let go of the weights and the KV."""
        for request_id in list(self.requests):
            self.abort(request_id)
        if self._offload is not None:
            self._offload.close()
        del self._forward, self._device
        self.hbm.close()

    def _admit(self) -> None:
        scheduler, offload = self._scheduler, self._offload
        while (sequence := scheduler.admit()) is not None:
            if offload is not None:
                offload.begin(sequence)
        if offload is not None:
            offload.poll(others_run=any(s.phase is Phase.RUNNING for s in scheduler.running))
            offload.prefetch(islice(scheduler.waiting, LOOKAHEAD_SEQUENCES))

    def _draw(self, sequences: Sequence[TokenSequence], logits: Tensor) -> list[int]:
        """The next token of each sequence, and of each sibling that it is about to have."""
        samplers: list[Sampler] = []
        rows: list[int] = []
        for row, sequence in enumerate(sequences):
            generations = self.requests[sequence.order[0]].generations
            own = generations[sequence.index : sequence.index + sequence.width]
            samplers += [generation.sampler for generation in own]
            rows += [row] * len(own)
        return draw_all(samplers, rows_of(logits, rows) if len(rows) > len(sequences) else logits)

    def _accept(self, sequence: TokenSequence, token: int) -> Delta:
        """A sequence has its next token: pass it on, and see whether it was the last."""
        request = self.requests[sequence.order[0]]
        generation = request.generations[sequence.index]
        sequence.append(token)
        text = generation.push(token, last=len(sequence.tokens) >= request.limit_tokens)
        now_s = time.monotonic()
        request.completion_tokens += 1
        request.first_token_s = request.first_token_s or now_s
        usage = None
        if generation.finish_reason is not None:
            self._scheduler.remove(sequence)
            if request.finished:
                usage = request.usage(now_s)
                del self.requests[request.request_id]
                self._counters["finished_requests"] += 1
                self._counters.update({f"{s}_tokens": n for s, n in request.sources.items()})
        return Delta(
            request.request_id, sequence.index, text, (token,), generation.finish_reason, usage
        )

    def _demote(self, sequence: TokenSequence) -> None:
        if self._offload is not None:
            self._offload.demote(sequence)

    def _prefill_of(self, pieces: Sequence[Piece]) -> Observe | None:
        """What learns the speed of prefill from a step that is one; to be told the time it took."""
        if all(piece.tokens == 1 for piece in pieces):
            return None
        tokens = sum(piece.tokens for piece in pieces)
        positions = sum(
            piece.tokens * (piece.sequence.computed_tokens + piece.tokens / 2) for piece in pieces
        )
        return partial(self._prefill_cost.observe, tokens, positions)

"""Which tokens of which sequences the next step computes, and in which blocks.

Pure: no tensors, no clock, no I/O. It moves references in the block pool; the
engine does what follows from that (copies, loads, the forward pass).
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from kvstore.engine.sequence import Phase, TokenSequence
from kvstore.errors import InvariantError
from kvstore.hashing import Key
from kvstore.tiers.block_pool import BlockPool


class Piece(NamedTuple):
    """The next `tokens` pending tokens of `sequence`: one when decoding, a chunk in prefill."""

    sequence: TokenSequence
    tokens: int

    @property
    def finishes(self) -> bool:
        """Whether the next token of the sequence can be drawn once the piece is computed."""
        return self.tokens == self.sequence.pending_tokens

    @property
    def is_decode(self) -> bool:
        """Whether it is the one token that is missing."""
        return self.tokens == 1 and self.finishes


class Step(NamedTuple):
    """What to do next: copy whole blocks `(source, target)`, then compute the pieces."""

    copies: list[tuple[int, int]]
    pieces: list[Piece]


class Scheduler:
    """First come, first served, over one block pool.

    Every step takes one token of each decoding sequence and up to `chunk_tokens`
    tokens of prompts. Chunks end at multiples of `chunk_tokens` of the prompt's
    own positions, wherever they begin: after a hit the same chunks follow as
    without it. Or where blocks begin that are being loaded.

    `demote` is called with a sequence that must give up its blocks, while their
    content is still there.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_batch: int,
        chunk_tokens: int,
        demote: Callable[[TokenSequence], None],
    ) -> None:
        self._pool = pool
        self._max_batch = max_batch
        self._chunk_tokens = chunk_tokens
        self._demote = demote
        self.waiting: deque[TokenSequence] = deque()  # oldest first
        self.running: list[TokenSequence] = []  # hold blocks (also those that load); oldest first
        self.preemptions = 0

    def add(self, sequence: TokenSequence) -> None:
        insort(self.waiting, sequence, key=_order)

    def admit(self) -> TokenSequence | None:
        """Give blocks to the oldest waiting sequence, if it can start now.

        What HBM still knows of it is shared; the rest of its blocks are taken at
        once, in one run where possible.
        """
        if not self.waiting:
            return None
        sequence = self.waiting[0]
        width = sum(other.width for other in self.running)
        if width + sequence.width > self._max_batch:
            return None
        found = self._pool.find(sequence.next_blocks().keys)
        wanted = -(-len(sequence.tokens) // sequence.block_tokens) - len(found)
        revived = sum(self._pool.is_cached(block) for block in found)
        # A block each for those that run, or the newcomer would be thrown out at once.
        needed = wanted + revived + width
        if needed > self._pool.free_blocks and (self.running or self._pool.held_blocks):
            return None
        self._pool.share(found)
        taken = self._pool.take(wanted, after=found[-1] if found else None)
        if len(taken) < wanted:
            raise InvariantError(f"{wanted} blocks are wanted, and the pool can never give them")
        self.waiting.popleft()
        sequence.block_table = found + taken
        sequence.advance(len(found) * sequence.block_tokens, "hbm")
        sequence.phase = Phase.RUNNING
        insort(self.running, sequence, key=_order)
        return sequence

    def is_alone(self, sequence: TokenSequence) -> bool:
        """Whether nobody else runs or waits."""
        return self.running == [sequence] and not self.waiting

    def catch_up(self, sequence: TokenSequence) -> None:
        """Share the next blocks of `sequence` that others have computed or loaded meanwhile."""
        found = self._pool.find(sequence.next_blocks().keys)
        if not found:
            return
        start = sequence.computed_blocks
        own = sequence.block_table[start : start + len(found)]
        self._pool.share(found)
        sequence.block_table[start : start + len(found)] = found
        self._pool.release(own)
        sequence.advance(len(found) * sequence.block_tokens, "hbm")

    def plan(self) -> Step:
        """The next step. May preempt: the youngest, for blocks that an older one needs."""
        copies: list[tuple[int, int]] = []
        pieces: list[Piece] = []
        prefilling: list[TokenSequence] = []
        for sequence in self.running.copy():
            if sequence.phase is Phase.WAITING or not sequence.computable_tokens:
                continue  # preempted a moment ago, or all that it lacks is on its way
            if sequence.pending_tokens > 1:
                prefilling.append(sequence)
            elif self._make_room(sequence, copies):
                pieces.append(Piece(sequence, 1))
        pieces += self._chunks(s for s in prefilling if s.phase is not Phase.WAITING)
        return Step(copies, pieces)

    def advance(self, piece: Piece) -> None:
        """The piece has been computed: its KV is in the sequence's blocks."""
        piece.sequence.advance(piece.tokens, "recomputed")
        self.name_blocks(piece.sequence, piece.tokens)

    def name_blocks(self, sequence: TokenSequence, tokens: int) -> None:
        """Make the blocks that the latest `tokens` tokens filled findable by their keys."""
        first = (sequence.computed_tokens - tokens) // sequence.block_tokens
        chain = sequence.chain.chain(first, sequence.computed_blocks)
        for block, key in zip(sequence.block_table[first:], chain.keys, strict=False):
            self._pool.name(block, key)

    def fork(self, sequence: TokenSequence) -> list[TokenSequence]:
        """The siblings of a sequence whose prompt is computed; they share all its blocks."""
        siblings = [sequence.fork(index) for index in range(1, sequence.width)]
        sequence.width = 1
        for sibling in siblings:
            self._pool.share(sibling.block_table)
            insort(self.running, sibling, key=_order)
        return siblings

    def remove(self, sequence: TokenSequence) -> None:
        """The sequence has ended, or was aborted: its blocks become free, keys and all."""
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._pool.release(sequence.surrender())
        sequence.phase = Phase.FINISHED

    def _chunks(self, sequences: Iterable[TokenSequence]) -> list[Piece]:
        pieces: list[Piece] = []
        budget = self._chunk_tokens
        being_filled: set[Key] = set()
        for sequence in sequences:
            self.catch_up(sequence)
            following = sequence.next_blocks().keys
            if following and following[0] in being_filled:
                continue  # another computes the same block in this very step
            end = (sequence.computed_tokens // self._chunk_tokens + 1) * self._chunk_tokens
            tokens = min(end - sequence.computed_tokens, sequence.computable_tokens)
            if not tokens:
                continue  # others have just brought what it could have computed
            if tokens > budget:
                break  # nobody overtakes
            budget -= tokens
            being_filled.update(following[: -(-tokens // sequence.block_tokens)])
            pieces.append(Piece(sequence, tokens))
        return pieces

    def _make_room(self, sequence: TokenSequence, copies: list[tuple[int, int]]) -> bool:
        """A block of its own for the next token; False when there is none in this step.

        Then `sequence` itself had to go, or blocks will be free as soon as they are copied:
        nobody else is thrown out while that can be waited for.
        """
        table = sequence.block_table
        place = sequence.computed_tokens // sequence.block_tokens
        before = table[place - 1] if place else None
        # A preemption may free a block, or leave a shared one to this sequence alone.
        while place == len(table) or self._pool.references(table[place]) > 1:
            taken = self._pool.take(1, after=before)
            if not taken:
                if self._pool.held_blocks:
                    return False
                youngest = self.running[-1]
                self._preempt(youngest)
                if youngest is sequence:
                    return False
            elif place == len(table):
                table.extend(taken)
            else:  # shared with a sibling: copy on write
                copies.append((table[place], taken[0]))
                self._pool.release(table[place : place + 1])
                # Another list, by which who has read this one sees that it is no longer true.
                table = sequence.block_table = [*table[:place], *taken, *table[place + 1 :]]
        return True

    def _preempt(self, sequence: TokenSequence) -> None:
        self._demote(sequence)
        self.running.remove(sequence)
        self._pool.release(sequence.surrender())
        insort(self.waiting, sequence, key=_order)
        self.preemptions += 1

    def check_invariants(self) -> None:
        """Raises InvariantError unless every reference in the pool belongs to a sequence here."""
        self._pool.check_invariants()
        references: dict[int, int] = {}
        for sequence in self.running:
            if sequence.phase not in (Phase.RUNNING, Phase.LOADING):
                raise InvariantError(f"a {sequence.phase.value} sequence is among the running")
            if len(sequence.block_table) * sequence.block_tokens < sequence.computed_tokens:
                raise InvariantError("a block table is shorter than the computed tokens")
            for block in sequence.block_table:
                references[block] = references.get(block, 0) + 1
        for block in range(self._pool.blocks):
            if references.get(block, 0) != self._pool.references(block):
                raise InvariantError(f"block {block} is referenced by nobody here, or not counted")
        if any(s.phase is not Phase.WAITING or s.block_table for s in self.waiting):
            raise InvariantError("a waiting sequence holds blocks")
        for queue in (list(self.waiting), self.running):
            if queue != sorted(queue, key=_order):
                raise InvariantError("the oldest sequence is not first")
        if sum(s.width for s in self.running) > self._max_batch:
            raise InvariantError(f"more than {self._max_batch} sequences run")


def _order(sequence: TokenSequence) -> tuple[int, int]:
    return sequence.order

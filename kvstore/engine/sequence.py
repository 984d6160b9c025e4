"""One token sequence on its way through the engine. Pure: no tensors, no clock."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from kvstore.hashing import Chain, TokenChain
from kvstore.identity import Namespace

# Where the KV of a prompt token came from.
Source = Literal["hbm", "ram", "nvme", "remote", "recomputed"]


class Phase(enum.Enum):
    """Where a sequence is."""

    WAITING = "waiting"  # holds no blocks
    LOADING = "loading"  # holds blocks that leases are filling; computed up to the first of them
    RUNNING = "running"  # scheduled: prefill until all its tokens but the newest are in HBM
    FINISHED = "finished"  # holds no blocks


class TokenSequence:
    """Tokens, their keys, and the blocks of HBM that hold their KV.

    The first `computed_tokens` have their KV in the blocks of `block_table`. The
    first `offered_blocks` of these were offered to the store. From block
    `loading_from` on, while it is LOADING, others write to its blocks. `width` is the
    number of sequences that this one will become when its prompt is computed.
    """

    def __init__(
        self,
        namespace: Namespace,
        prompt: Sequence[int],
        *,
        arrival: int,
        index: int = 0,
        width: int = 1,
    ) -> None:
        self.order = (arrival, index)  # who came first; nobody else has the same
        self.width = width
        self.tokens = list(prompt)
        self.prompt_tokens = len(prompt)
        self.chain = TokenChain(namespace, prompt)
        self.phase = Phase.WAITING
        self.block_table: list[int] = []
        self.computed_tokens = 0
        self.offered_blocks = 0
        self.loading_from = 0
        self.prefetched = False
        self.sources: Counter[Source] = Counter()
        self._accounted_tokens = 0

    @property
    def index(self) -> int:
        """Which of the n siblings of its request."""
        return self.order[1]

    @property
    def block_tokens(self) -> int:
        return self.chain.namespace.block_tokens

    @property
    def pending_tokens(self) -> int:
        """Tokens whose KV is not in HBM; 1 while decoding."""
        return len(self.tokens) - self.computed_tokens

    @property
    def computable_tokens(self) -> int:
        """Pending tokens that could be computed next; 0 where blocks must come first."""
        if self.phase is not Phase.LOADING:
            return self.pending_tokens
        return max(0, self.loading_from * self.block_tokens - self.computed_tokens)

    @property
    def reusable_blocks(self) -> int:
        """Leading blocks that may come from a cache: the last token is always computed."""
        return (len(self.tokens) - 1) // self.block_tokens

    @property
    def computed_blocks(self) -> int:
        """Full blocks whose content is final."""
        return self.computed_tokens // self.block_tokens

    def next_blocks(self) -> Chain:
        """The blocks that follow the computed ones and may come from a cache.

        Empty unless computing stands at the border of a block.
        """
        if self.computed_tokens % self.block_tokens:
            return self.chain.chain(0, 0)
        return self.chain.chain(self.computed_blocks, self.reusable_blocks)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.chain.extend((token,))

    def advance(self, tokens: int, source: Source) -> None:
        """The KV of the next `tokens` tokens is in HBM now, and came from `source`.

        A prompt token is accounted for once: what is loaded or computed again
        after a preemption does not count.
        """
        self.computed_tokens += tokens
        reached = min(self.computed_tokens, self.prompt_tokens)
        if reached > self._accounted_tokens:
            self.sources[source] += reached - self._accounted_tokens
            self._accounted_tokens = reached

    def surrender(self) -> list[int]:
        """Give up all blocks, to come back for them later; returns them in order."""
        blocks, self.block_table = self.block_table, []
        self.computed_tokens = 0
        self.prefetched = False
        self.phase = Phase.WAITING
        return blocks

    def fork(self, index: int) -> TokenSequence:
        """A sibling with the same tokens and blocks; the caller counts the references."""
        sibling = TokenSequence(self.chain.namespace, (), arrival=self.order[0], index=index)
        sibling.tokens = self.tokens.copy()
        sibling.chain = self.chain.fork()
        sibling.prompt_tokens = sibling._accounted_tokens = self.prompt_tokens
        sibling.phase = self.phase
        sibling.block_table = self.block_table.copy()
        sibling.computed_tokens = self.computed_tokens
        sibling.offered_blocks = self.offered_blocks
        return sibling

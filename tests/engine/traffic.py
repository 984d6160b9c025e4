"""Requests, aborts and evictions at random, for engines whose copies take their time."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from kvstore.engine.engine import Engine
from kvstore.hashing import TokenChain
from kvstore.store import BlockStore
from tests.engine.reference import GREEDY, PROMPTS


class Traffic:
    """Drives one engine over one store; `seed` decides everything."""

    def __init__(
        self,
        engine: Engine,
        store: BlockStore,
        seed: int,
        expected: Sequence[tuple[int, ...]],
    ) -> None:
        """`expected[i]` is the answer to `PROMPTS[i]`."""
        self.engine, self.store = engine, store
        self.random = random.Random(seed)
        self.expected = expected
        self.tokens: dict[int, list[int]] = {}
        self.numbers: dict[int, int] = {}  # of the prompts

    def run(self, steps: int, between: Callable[[random.Random], object]) -> None:
        """So many steps, `between` which copies may come to their end; then all that is left."""
        for _ in range(steps):
            self._disturb()
            between(self.random)
            self._step()
        while self.engine.busy:
            self._step()

    def check(self) -> None:
        for request, number in self.numbers.items():
            assert tuple(self.tokens[request]) == self.expected[number]

    def _step(self) -> None:
        for delta in self.engine.step():
            self.tokens[delta.request_id] += delta.token_ids
        self.engine.check_invariants()

    def _disturb(self) -> None:
        choice = self.random.random()
        if choice < 0.25 and len(self.numbers) < 40:
            number = self.random.randrange(len(PROMPTS))
            request = self.engine.add_request(PROMPTS[number], GREEDY)
            self.numbers[request], self.tokens[request] = number, []
        elif choice < 0.28 and self.numbers:
            request = self.random.choice(list(self.numbers))
            self.engine.abort(request)
            del self.numbers[request]
        elif choice < 0.33:
            self.engine.clear_hbm()
        elif choice < 0.4:
            prompt = self.random.choice(PROMPTS)
            self.store.evict(TokenChain(self.engine.namespace, prompt).chain(2))

"""The side of the vLLM connector that runs with the scheduler: it decides what to load and save."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvstore.connectors.accounts import Accounts
from kvstore.connectors.connector import Connector
from kvstore.connectors.vllm_jobs import Done, Job, Orders
from kvstore.connectors.vllm_lookups import GRACE_S, Lookups, Question
from kvstore.connectors.vllm_namespace import RequestNamespaces
from kvstore.connectors.vllm_prefill import PrefillClock
from kvstore.connectors.vllm_stats import KVStoreStats
from kvstore.hashing import TokenChain
from kvstore.identity import Namespace
from kvstore.verbs import Store

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

CONNECTORS = 256  # namespaces whose connector is kept


@dataclass
class Tracked:
    """A request, from when it is first seen until it has finished."""

    request: Request
    chain: TokenChain
    question: Question | None = None
    start: int = 0  # of what is to be loaded
    saved: int = 0  # tokens of which a save was ordered
    saving: int = 0  # saves ordered and not ended, over all workers
    load_failed: bool = False

    def extend(self, tokens: int) -> None:
        """Hash the first `tokens` tokens, as far as that was not done."""
        if tokens > self.chain.tokens:
            self.chain.extend(self.request.all_token_ids[self.chain.tokens : tokens])


@dataclass
class Pending:
    """What the next step's orders will say, besides what it computes."""

    loads: list[Job] = field(default_factory=list)
    held: set[str] = field(default_factory=set)


class Scheduler:
    """Belongs to vLLM's scheduler thread, and never waits for the store."""

    def __init__(
        self,
        store: Store,
        model: Namespace,
        salt: str,
        page_tokens: int,
        workers: int,
        role: str = "kv_both",
    ) -> None:
        """`page_tokens` are those of vLLM's blocks. The store is borrowed.

        `role` is vLLM's: "kv_producer" loads nothing, "kv_consumer" saves nothing.
        """
        self._store = store
        self._model = model
        self._salt = salt
        self._page_tokens = page_tokens
        self._workers = workers
        self._role = role
        self._accounts = Accounts()
        self._reported = self._accounts.stats()
        self._has_news = False
        self._lookups = Lookups(self._accounts)
        self._prefill = PrefillClock()
        self._namespaces = RequestNamespaces(model, salt)
        self._connectors: dict[Namespace, Connector] = {}
        self._requests: dict[str, Tracked | None] = {}
        self._pending = Pending()

    # ---- a request comes

    def arrived(self, request: Request) -> None:
        """Look its prompt up, so that what is not in RAM is on its way while it waits."""
        tracked = self._track(request)
        if tracked is not None and self._role != "kv_producer":
            self._ask(tracked, 0)

    def matched(self, request: Request, start: int) -> int | None:
        """How many tokens after the first `start` to load; None: ask again in the next step."""
        tracked = self._track(request)
        if tracked is None or tracked.load_failed or self._role == "kv_producer":
            return 0
        question = tracked.question
        if question is None or question.start != start or not self._lookups.is_fresh(question):
            question = self._ask(tracked, start)
        self._has_news = True
        found = self._lookups.answer(question, GRACE_S if question.ready < 0 else 0.0)
        if found is None:
            return None
        tracked.start = start
        # The last token is computed, for its logits.
        last: int = request.num_tokens - 1
        return max(0, min(found, last - start))

    def allocated(self, request: Request, pages: list[int], tokens: int) -> None:
        """These tokens, which `matched` has promised, are to be loaded into the request's pages."""
        tracked = self._requests.get(request.request_id)
        if tokens and tracked is not None:
            self._pending.loads.append(
                self._job(tracked, pages, tracked.start, tracked.start + tokens)
            )

    # ---- a step

    def orders(self, output: SchedulerOutput, pages_of: Callable[[str], list[int]]) -> Orders:
        """What the workers do in this step, of which `pages_of` tells a request's pages."""
        pending, self._pending = self._pending, Pending()
        scheduled = output.num_scheduled_tokens
        positions = [
            tracked.request.num_computed_tokens
            for each in scheduled
            if (tracked := self._requests.get(each)) is not None
        ]
        self._prefill.step_begins(len(scheduled), output.total_num_scheduled_tokens, sum(positions))
        orders = Orders(
            loads=pending.loads,
            saves=self._saves(output, pages_of),
            held=pending.held,
            preempted=set(output.preempted_req_ids or ()),
            is_idle=not output.total_num_scheduled_tokens,
        )
        if orders.is_idle:
            orders.is_looking_up = any(
                tracked is not None and tracked.question and tracked.question.tokens is None
                for tracked in self._requests.values()
            )
        return orders

    def _saves(self, output: SchedulerOutput, pages_of: Callable[[str], list[int]]) -> list[Job]:
        """Full blocks that this step completes, of tokens that are known: drafts are left out."""
        saves: list[Job] = []
        if self._role == "kv_consumer":
            return saves
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._requests.get(request_id)
            if tracked is None:
                continue
            request, size = tracked.request, tracked.chain.namespace.block_tokens
            computed = min(request.num_computed_tokens + scheduled, request.num_tokens)
            # What was computed before may have to be computed again: after preemption, say.
            start = min(tracked.saved, request.num_computed_tokens // size * size)
            stop = computed // size * size
            if stop > start:
                tracked.extend(stop)
                saves.append(self._job(tracked, pages_of(request_id), start, stop))
                tracked.saving += self._workers
            tracked.saved = stop
        return saves

    def heard(self, done: Done | None) -> None:
        """A step has ended, and this is what the workers say."""
        self._prefill.step_has_ended()
        if done is None:
            return
        for request_id, number in done.saves.items():
            if (tracked := self._requests.get(request_id)) is not None:
                tracked.saving -= number
        for request_id in done.failed_loads:
            if (tracked := self._requests.get(request_id)) is not None:
                tracked.load_failed = True  # it would fail again

    # ---- ends

    def finished(self, request_id: str) -> bool:
        """Whether its pages are still being saved, and must be kept."""
        tracked = self._requests.pop(request_id, None)
        if tracked is None or not tracked.saving:
            return False
        self._pending.held.add(request_id)
        return True

    def forget(self) -> None:
        """From now on nothing that was stored before is found, as by one with another salt."""
        weights = f"{self._model.weights} reset {uuid.uuid4().hex}"
        self._model = replace(self._model, weights=weights)
        self._namespaces = RequestNamespaces(self._model, self._salt)
        self._connectors.clear()
        for request_id, tracked in list(self._requests.items()):
            if tracked is not None:
                fresh = self._begin(tracked.request)
                if fresh is not None:
                    fresh.saving = tracked.saving
                self._requests[request_id] = fresh

    def stats(self) -> KVStoreStats | None:
        if not self._has_news:
            return None
        self._has_news = False
        now = self._accounts.stats()
        before, self._reported = self._reported, now
        stats = KVStoreStats.between(before, now)
        return None if stats.is_empty() else stats

    def close(self) -> None:
        self._lookups.close()

    # ---- inside

    def _track(self, request: Request) -> Tracked | None:
        """None for a request that is none of the store's."""
        if request.request_id not in self._requests:
            self._requests[request.request_id] = self._begin(request)
        return self._requests[request.request_id]

    def _begin(self, request: Request) -> Tracked | None:
        namespace = self._namespaces.of(request)
        return None if namespace is None else Tracked(request, TokenChain(namespace))

    def _ask(self, tracked: Tracked, start: int) -> Question:
        tracked.extend(tracked.request.num_tokens)
        connector = self._connector(tracked.chain.namespace)
        tracked.question = self._lookups.ask(connector, tracked.chain.chain(), start)
        return tracked.question

    def _job(self, tracked: Tracked, pages: list[int], start: int, stop: int) -> Job:
        """From the last token before `start` with which both a page and a block begin."""
        size, page_tokens = tracked.chain.namespace.block_tokens, self._page_tokens
        unit = math.lcm(size, page_tokens)
        base = start // unit * unit
        return Job(
            tracked.request.request_id,
            tracked.chain.chain(base // size, -(-stop // size)),
            list(pages[base // page_tokens : -(-stop // page_tokens)]),
            start - base,
            stop - base,
        )

    def _connector(self, namespace: Namespace) -> Connector:
        connector = self._connectors.get(namespace)
        if connector is None:
            while len(self._connectors) >= CONNECTORS:  # tenants come and go
                del self._connectors[next(iter(self._connectors))]
            connector = Connector(
                self._store, namespace, prefill=self._prefill.cost, accounts=self._accounts
            )
            self._connectors[namespace] = connector
        return connector

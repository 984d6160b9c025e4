"""The side of the vLLM connector that runs with the scheduler: it decides what to load and save."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvstore.connectors.accounts import Accounts
from kvstore.connectors.connector import Connector
from kvstore.connectors.vllm_jobs import Done, Job, Orders
from kvstore.connectors.vllm_lookups import LATE_S, Lookups, Question
from kvstore.connectors.vllm_prefill import PrefillClock, patience_s
from kvstore.connectors.vllm_report import Counts, Report
from kvstore.connectors.vllm_requests import RequestNamespaces
from kvstore.hashing import TokenChain
from kvstore.identity import Namespace
from kvstore.verbs import Store

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

CONNECTORS = 256  # namespaces whose connector is kept


@dataclass
class Tracked:
    """A request, from when it is first seen until it has finished.

    `naming` is asked for whenever its tokens are to be computed from the first one on. Without
    a chain it is neither loaded nor saved.
    """

    request: Request
    naming: Future[Namespace | None] | None = None
    chain: TokenChain | None = None
    question: Question | None = None
    waits_since_s: float | None = None  # for an answer, or for its namespace
    promised: tuple[TokenChain, int] | None = None  # of what, and from where on, is to be loaded
    saved: int = 0  # tokens of which a save was ordered
    dropped: int | None = None  # of these, the first that was not saved after all
    saving: int = 0  # saves ordered and not ended, over all workers
    load_failed: bool = False

    def extend(self, chain: TokenChain, tokens: int) -> None:
        """Hash the first `tokens` tokens, as far as that was not done."""
        if tokens > chain.tokens:
            chain.extend(self.request.all_token_ids[chain.tokens : tokens])


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
        page_tokens: int,
        workers: int,
        role: str = "kv_both",
    ) -> None:
        """`page_tokens` are those of vLLM's blocks. The store is borrowed.

        `role` is vLLM's: "kv_producer" loads nothing, "kv_consumer" saves nothing.
        """
        self._store = store
        self._model = model
        self._page_tokens = page_tokens
        self._workers = workers
        self._loads, self._saves = role != "kv_producer", role != "kv_consumer"
        self._accounts = Accounts()
        self._report = Report(self._accounts)
        self._lookups = Lookups(self._accounts)
        self._prefill = PrefillClock()
        self._namespaces = RequestNamespaces(model, self._accounts)
        self._connectors: dict[Namespace, Connector] = {}
        self._requests: dict[str, Tracked] = {}
        # Requests whose load is under way, and for how long they would be computed.
        self._loading: dict[str, float | None] = {}
        self._has_old_pages = False
        self._pending = Pending()

    # ---- a request comes

    def arrived(self, request: Request) -> None:
        """Look its prompt up, so that what is not in RAM is on its way while it waits."""
        tracked = self._named(request)
        if tracked.chain is not None and self._loads:
            self._ask(tracked, tracked.chain, 0)

    def matched(self, request: Request, start: int) -> int | None:
        """How many tokens after the first `start` to load; None: ask again in the next step.

        Asked before a request is computed from its first token on, be it again.
        """
        tracked = self._named(request)
        self._report.has_news = True
        now_s = time.monotonic()
        waited_s = now_s - (tracked.waits_since_s or now_s)
        found = self._found(tracked, start, waited_s)
        if found is None:
            tracked.waits_since_s = tracked.waits_since_s or now_s
            return None
        tracked.waits_since_s = None
        tracked.promised = None if tracked.chain is None else (tracked.chain, start)
        # The last token is computed, for its logits.
        last: int = request.num_tokens - 1
        return max(0, min(found, last - start))

    def allocated(self, request: Request, pages: list[int], tokens: int) -> None:
        """These tokens, which `matched` has promised, are to be loaded into the request's pages.

        The deadline is when all that is being loaded would have been computed.
        """
        tracked = self._requests[request.request_id]
        assert tracked.promised is not None
        chain, start = tracked.promised
        stop = start + tokens
        self._loading[request.request_id] = patience_s(self._prefill.cost, start, stop)
        costs = self._loading.values()
        known = [cost for cost in costs if cost is not None]
        deadline_s = sum(known) if len(known) == len(costs) else None
        self._pending.loads.append(self._job(request, chain, pages, start, stop, deadline_s))

    # ---- a step

    def orders(self, output: SchedulerOutput) -> Orders:
        """What the workers do in this step, but for its saves."""
        pending, self._pending = self._pending, Pending()
        for request_id in output.num_scheduled_tokens:
            self._loading.pop(request_id, None)
        self._lookups.step_begins()
        is_idle = not output.total_num_scheduled_tokens
        return Orders(
            loads=pending.loads,
            held=pending.held,
            preempted=set(output.preempted_req_ids or ()),
            is_idle=is_idle,
            is_looking_up=is_idle
            and any(each.waits_since_s is not None for each in self._requests.values()),
        )

    def computing(
        self, orders: Orders, output: SchedulerOutput, pages_of: Callable[[str], list[int]]
    ) -> None:
        """Add what is to be saved of what this step computes; `pages_of` a request is its table."""
        scheduled = output.num_scheduled_tokens
        if orders.is_idle:
            return
        positions = [
            tracked.request.num_computed_tokens
            for each in scheduled
            if (tracked := self._requests.get(each)) is not None
        ]
        orders.step = self._prefill.step_begins(
            len(scheduled), output.total_num_scheduled_tokens, sum(positions)
        )
        if self._saves:
            orders.saves = self._save_orders(output, pages_of)

    def _save_orders(
        self, output: SchedulerOutput, pages_of: Callable[[str], list[int]]
    ) -> list[Job]:
        """Full blocks that this step completes, of tokens that are known: drafts are left out."""
        saves: list[Job] = []
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._requests.get(request_id)
            if tracked is None or tracked.chain is None:
                continue
            request, size = tracked.request, tracked.chain.namespace.block_tokens
            computed = min(request.num_computed_tokens + scheduled, request.num_tokens)
            # What was computed before may have to be computed again: after preemption, say.
            start = min(tracked.saved, request.num_computed_tokens // size * size)
            stop = computed // size * size
            if stop > start:
                if tracked.dropped is not None:
                    start, tracked.dropped = min(start, tracked.dropped), None
                tracked.extend(tracked.chain, stop)
                saves.append(self._job(request, tracked.chain, pages_of(request_id), start, stop))
                tracked.saving += self._workers
            tracked.saved = stop
        return saves

    def heard(self, done: Done) -> None:
        """A step has ended, and this is what the workers say."""
        if done.step:
            self._prefill.step_has_ended(done.step)
        for request_id, number in done.saves.items():
            if (tracked := self._requests.get(request_id)) is not None:
                tracked.saving -= number
        for request_id, token in done.dropped.items():
            if (tracked := self._requests.get(request_id)) is not None:
                tracked.dropped = token if tracked.dropped is None else min(token, tracked.dropped)
        for request_id in done.failed_loads:
            if (tracked := self._requests.get(request_id)) is not None:
                tracked.load_failed = True  # it would fail again

    # ---- ends

    def finished(self, request_id: str) -> bool:
        """Whether its pages are still being saved, and must be kept."""
        is_loading = request_id in self._loading
        self._loading.pop(request_id, None)
        tracked = self._requests.pop(request_id, None)
        # One that is being loaded has been given new pages: vLLM keeps them until that is done,
        # and what is still being saved was in others.
        if tracked is None or is_loading or not tracked.saving:
            return False
        self._pending.held.add(request_id)
        return True

    def forget(self, pages_in_use: bool) -> None:
        """From now on nothing that was stored before is found, as by one with another salt.

        Requests under way are neither loaded nor saved, until they are computed from their
        first token on. With `pages_in_use`, vLLM has not forgotten its own pages: requests that
        begin with some of them are not loaded or saved either, until it has.
        """
        weights = f"{self._model.weights} reset {uuid.uuid4().hex}"
        self._model = replace(self._model, weights=weights)
        self._namespaces.close()
        self._namespaces = RequestNamespaces(self._model, self._accounts)
        self._connectors.clear()
        self._has_old_pages = pages_in_use
        for request_id, tracked in self._requests.items():
            self._requests[request_id] = Tracked(
                tracked.request, promised=tracked.promised, saving=tracked.saving
            )

    def counts(self) -> Counts | None:
        """What has been counted since the last call."""
        return self._report.take()

    def close(self) -> None:
        self._lookups.close()
        self._namespaces.close()

    # ---- inside

    def _named(self, request: Request) -> Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is None:
            tracked = self._requests[request.request_id] = Tracked(request)
        if tracked.naming is None:
            tracked.naming = self._namespaces.of(request)
        if tracked.chain is None and tracked.naming.done():
            namespace = tracked.naming.result()
            tracked.chain = None if namespace is None else TokenChain(namespace)
        return tracked

    def _found(self, tracked: Tracked, start: int, waited_s: float) -> int | None:
        """How many tokens there are after the first `start`, if that is known."""
        if start and self._has_old_pages:
            tracked.chain = None
        elif tracked.naming is not None and not tracked.naming.done():
            return None if waited_s < LATE_S else 0
        if tracked.chain is None or tracked.load_failed or not self._loads:
            return 0
        question = tracked.question
        if question is None or question.start != start or not self._lookups.is_fresh(question):
            question = self._ask(tracked, tracked.chain, start)
        return self._lookups.answer(question, waited_s)

    def _ask(self, tracked: Tracked, chain: TokenChain, start: int) -> Question:
        tracked.extend(chain, tracked.request.num_tokens)
        connector = self._connector(chain.namespace)
        tracked.question = self._lookups.ask(connector, chain.chain(), start)
        return tracked.question

    def _job(
        self,
        request: Request,
        chain: TokenChain,
        pages: list[int],
        start: int,
        stop: int,
        deadline_s: float | None = None,
    ) -> Job:
        """From the last token before `start` with which both a page and a block begin."""
        size, page_tokens = chain.namespace.block_tokens, self._page_tokens
        unit = math.lcm(size, page_tokens)
        base = start // unit * unit
        return Job(
            request.request_id,
            chain.chain(base // size, -(-stop // size)),
            list(pages[base // page_tokens : -(-stop // page_tokens)]),
            base,
            start - base,
            stop - base,
            deadline_s,
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

"""The side of the vLLM connector that runs with the model: it moves KV, in threads of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from kvstore.connectors.accounts import Accounts, ConnectorStats
from kvstore.connectors.connector import SAVES_BEHIND, Connector
from kvstore.connectors.convert import Pages
from kvstore.connectors.vllm_jobs import Done, Job, Orders
from kvstore.connectors.vllm_stats import KVStoreStats
from kvstore.identity import Namespace
from kvstore.verbs import Store

log = logging.getLogger(__name__)

LOADS_AT_ONCE = 4
IDLE_S = 0.002  # that a step with nothing to compute waits for the store


class Worker:
    """Loads and saves the pages of one rank. All but the threads belongs to vLLM's worker thread.

    Without pages (None) nothing is loaded or saved, and nobody waits for it.
    """

    def __init__(self, store: Store, deadline_s: float, reports: bool) -> None:
        """The store is borrowed. `reports`: whether this is the rank that speaks for all."""
        self.pages: Pages | None = None
        self._store = store
        self._deadline_s = deadline_s
        self._reports = reports
        self._accounts = Accounts()
        self._reported: ConnectorStats | None = None
        self._has_news = False
        self._connectors: dict[Namespace, Connector] = {}
        self._lock = threading.Lock()
        self._loading = ThreadPoolExecutor(LOADS_AT_ONCE, "kvstore-load")
        self._saving = ThreadPoolExecutor(1, "kvstore-save")
        self._loads: dict[str, Future[set[int]]] = {}
        self._saves: defaultdict[str, set[Future[None]]] = defaultdict(set)
        self._held: set[str] = set()
        self._failed_pages: set[int] = set()
        self._done = Done()

    # ---- orders

    def start_loads(self, orders: Orders) -> None:
        for job in orders.loads:
            self._loads[job.request_id] = self._loading.submit(self._load, job)

    def start_saves(self, orders: Orders) -> None:
        """The KV of these tokens has been computed. What there is no room for is dropped."""
        for job in orders.saves:
            waiting = sum(len(saves) for saves in self._saves.values())
            if self.pages is None or waiting >= SAVES_BEHIND:
                blocks = (job.stop - job.start) // job.chain.namespace.block_tokens
                self._accounts.count("dropped_blocks", blocks)
                self._has_news = True
                self._done.saves[job.request_id] += 1
            else:
                self._saves[job.request_id].add(self._saving.submit(self._save, job))

    def wait_for_saves(self, request_ids: set[str]) -> None:
        """Their pages go to others: saves not begun are dropped, and the one that runs awaited."""
        saves = [save for each in request_ids for save in self._saves.get(each, ())]
        running = [save for save in saves if not save.cancel()]
        wait(running)

    def rest(self, orders: Orders) -> None:
        """Leave the processor to the threads in a step with nothing to compute, for a moment."""
        if not orders.is_idle:
            return
        held = [save for each in self._held | orders.held for save in self._saves.get(each, ())]
        pending: list[Future[Any]] = [*self._loads.values(), *held]
        if pending:
            wait(pending, IDLE_S, FIRST_COMPLETED)
        elif orders.is_looking_up:
            time.sleep(IDLE_S / 2)

    # ---- answers

    def finished(self, orders: Orders) -> tuple[set[str], set[str]]:
        """Held requests whose saves are done, and requests whose loads are."""
        self._held |= orders.held
        for request_id, saves in list(self._saves.items()):
            ended = {save for save in saves if save.done()}
            saves -= ended
            self._done.saves[request_id] += len(ended)
            if not saves:
                del self._saves[request_id]
        saved = {each for each in self._held if each not in self._saves}
        self._held -= saved
        self._has_news |= bool(self._done.saves)
        loaded = {each for each, load in self._loads.items() if load.done()}
        for each in loaded:
            failed = self._loads.pop(each).result()
            self._has_news = True
            self._failed_pages |= failed
            if failed:
                self._done.failed_loads.add(each)
        return saved, loaded

    def failed_pages(self) -> set[int]:
        """Of the loads that have ended since the last call."""
        failed, self._failed_pages = self._failed_pages, set()
        return failed

    def done(self) -> Done | None:
        done, self._done = self._done, Done()
        return done if done.saves or done.failed_loads else None

    def stats(self) -> KVStoreStats | None:
        if not (self._reports and self._has_news):
            return None
        self._has_news = False
        now = self._accounts.stats()
        before, self._reported = self._reported, now
        stats = KVStoreStats.between(before, now)
        return None if stats.is_empty() else stats

    def close(self) -> None:
        """Waits for the saves that were begun."""
        self._loading.shutdown()
        self._saving.shutdown()

    # ---- in the threads

    def _load(self, job: Job) -> set[int]:
        """The pages that did not come whole."""
        assert self.pages is not None
        try:
            connector = self._connector(job.chain.namespace, self.pages)
            load = connector.load(
                job.chain, job.table, self.pages, start_token=job.start, stop_token=job.stop
            )
            load.wait()
        except Exception as error:
            self._accounts.store_failed("load", error)
            size = self.pages.layout.block_tokens
            return set(job.table[job.start // size : -(-job.stop // size)])
        return load.failed_pages

    def _save(self, job: Job) -> None:
        assert self.pages is not None
        try:
            connector = self._connector(job.chain.namespace, self.pages)
            connector.save(
                job.chain, job.table, self.pages, start_token=job.start, stop_token=job.stop
            )
        except Exception as error:
            self._accounts.store_failed("save", error)

    def _connector(self, namespace: Namespace, pages: Pages) -> Connector:
        with self._lock:
            connector = self._connectors.get(namespace)
            if connector is None:
                while len(self._connectors) >= 256:  # tenants come and go
                    del self._connectors[next(iter(self._connectors))]
                connector = Connector(
                    self._store,
                    namespace,
                    heads=pages.layout.held,
                    deadline_s=self._deadline_s,
                    accounts=self._accounts,
                )
                self._connectors[namespace] = connector
            return connector

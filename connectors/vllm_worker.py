"""The side of the vLLM connector that runs with the model: it moves KV, in threads of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from kvstore.connectors.accounts import Accounts
from kvstore.connectors.connector import Connector
from kvstore.connectors.convert import Pages
from kvstore.connectors.vllm_jobs import Done, Job, Orders
from kvstore.connectors.vllm_report import Counts, Report
from kvstore.connectors.vllm_saves import Saves, TakenBackError
from kvstore.identity import Namespace
from kvstore.verbs import Store

LOADS_AT_ONCE = 4
CONNECTORS = 256  # namespaces whose connector is kept
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
        self._report = Report(self._accounts)
        self._connectors: dict[Namespace, Connector] = {}
        self._lock = threading.Lock()
        self._loading = ThreadPoolExecutor(LOADS_AT_ONCE, "kvstore-load")
        self._saves = Saves(self._save)
        self._loads: dict[str, Future[set[int]]] = {}
        self._held: set[str] = set()
        self._failed_pages: set[int] = set()
        self._done = Done()

    # ---- orders

    def start_loads(self, orders: Orders) -> None:
        self._done.step = orders.step
        pages = self._followed(orders.loads)
        for job in orders.loads:
            until_s = time.monotonic() + min(self._deadline_s, job.deadline_s or self._deadline_s)
            self._loads[job.request_id] = self._loading.submit(self._load, job, pages, until_s)

    def start_saves(self, orders: Orders) -> None:
        """The KV of these tokens has been computed. What there is no room for is dropped.

        Saves that wait are of half of the pages at most: of finished requests, they hold them.
        """
        pages = self._followed(orders.saves)
        waiting = self._saves.blocks
        for job in orders.saves:
            if pages is None or (waiting and waiting + job.blocks > self._most_waiting(job)):
                self._accounts.count("dropped_blocks", job.blocks)
                self._report.has_news = True
                self._done.saves[job.request_id] += 1
                self._done.drop(job.request_id, job.base + job.start)
            else:
                self._saves.add(job, pages)
                waiting += job.blocks

    def take_back(self, request_ids: set[str]) -> None:
        """Their pages go to others: saves not begun are dropped, the one that runs is ended."""
        self._saves.take_back(request_ids)

    def rest(self, orders: Orders) -> None:
        """Leave the processor to the threads in a step with nothing to compute, for a moment."""
        if not orders.is_idle:
            return
        held = self._saves.of(self._held | orders.held)
        pending: list[Future[Any]] = [*self._loads.values(), *held]
        if pending:
            wait(pending, IDLE_S, FIRST_COMPLETED)
        elif orders.is_looking_up:
            time.sleep(IDLE_S / 2)

    # ---- answers

    def finished(self, orders: Orders) -> tuple[set[str], set[str]]:
        """Held requests whose saves are done, and requests whose loads are."""
        self._held |= orders.held
        ended = self._saves.ended()
        self._done.saves.update(ended)
        saved = {each for each in self._held if not self._saves.of([each])}
        self._held -= saved
        self._report.has_news |= bool(ended)
        loaded = {each for each, load in self._loads.items() if load.done()}
        for each in loaded:
            failed = self._loads.pop(each).result()
            self._report.has_news = True
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
        return done if done else None

    def counts(self) -> Counts | None:
        """What has been counted since the last call, by the rank that speaks for all."""
        return self._report.take() if self._reports else None

    def close(self) -> None:
        """Waits for the saves that were begun."""
        self._loading.shutdown()
        self._saves.close()

    def _followed(self, jobs: Sequence[Job]) -> Pages | None:
        """Pages for these jobs: copied after what this thread has told the device, and no later."""
        return self.pages.follow() if jobs and self.pages is not None else None

    # ---- in the threads

    def _load(self, job: Job, pages: Pages | None, until_s: float) -> set[int]:
        """The pages that did not come whole."""
        assert pages is not None
        try:
            connector = self._connector(job.chain.namespace, pages)
            load = connector.load(
                job.chain,
                job.table,
                pages,
                start_token=job.start,
                stop_token=job.stop,
                deadline_s=max(0.0, until_s - time.monotonic()),
            )
            load.wait()
        except Exception as error:
            self._accounts.store_failed("load", error)
            size = pages.layout.block_tokens
            return set(job.table[job.start // size : -(-job.stop // size)])
        return load.failed_pages

    def _save(self, job: Job, pages: Pages) -> None:
        try:
            connector = self._connector(job.chain.namespace, pages)
            connector.save(job.chain, job.table, pages, start_token=job.start, stop_token=job.stop)
        except TakenBackError:
            pass  # what had been copied was not kept
        except Exception as error:
            self._accounts.store_failed("save", error)

    def _most_waiting(self, job: Job) -> int:
        """Blocks such as the job's."""
        assert self.pages is not None
        layout, size = self.pages.layout, job.chain.namespace.block_tokens
        return layout.blocks * layout.block_tokens // size // 2

    def _connector(self, namespace: Namespace, pages: Pages) -> Connector:
        with self._lock:
            connector = self._connectors.get(namespace)
            if connector is None:
                while len(self._connectors) >= CONNECTORS:  # tenants come and go
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

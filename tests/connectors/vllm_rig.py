"""Both sides of the vLLM connector over a real store, and steps such as vLLM's scheduler makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from kvstore.connectors.vllm_jobs import Done, Orders
from kvstore.connectors.vllm_scheduler import Scheduler
from kvstore.connectors.vllm_worker import Worker
from kvstore.verbs import Store
from tests.connectors.memory import NAMESPACE, TABLE, TOKENS, Memory
from tests.store.rig import Rig as StoreRig
from tests.store.rig import RunningClock

PAGE_TOKENS = 32
DEADLINE_S = 60.0


def request(name: str = "a", tokens: list[int] = TOKENS, **fields: Any) -> Any:
    """What the connector looks at of vLLM's requests."""
    common: dict[str, Any] = {"mm_features": [], "prompt_embeds": None, "pooling_params": None}
    return SimpleNamespace(
        **{**common, "cache_salt": None, "lora_request": None, **fields},
        request_id=name,
        all_token_ids=tokens,
        num_tokens=len(tokens),
        num_computed_tokens=0,
    )


class Ended(NamedTuple):
    """What vLLM hears of a step."""

    saved: set[str]
    loaded: set[str]
    failed_pages: set[int]
    done: Done | None


class Rig:
    """One worker, whose pages are `memory`; every request's are TABLE."""

    def __init__(self, store: Store, role: str = "kv_both") -> None:
        self.memory = Memory()
        self.scheduler = Scheduler(store, NAMESPACE, PAGE_TOKENS, 1, role)
        self.worker = Worker(store, DEADLINE_S, reports=True)
        self.worker.pages = self.memory.pages

    def orders(
        self, scheduled: Iterable[tuple[Any, int]] = (), preempted: Iterable[Any] = ()
    ) -> Orders:
        """The scheduler's part of a step that computes so many tokens of each request."""
        pairs = list(scheduled)
        output: Any = SimpleNamespace(
            num_scheduled_tokens={each.request_id: tokens for each, tokens in pairs},
            total_num_scheduled_tokens=sum(tokens for _, tokens in pairs),
            preempted_req_ids={each.request_id for each in preempted},
        )
        orders = self.scheduler.orders(output)
        self.scheduler.computing(orders, output, lambda _: TABLE)
        for each, tokens in pairs:
            each.num_computed_tokens += tokens
        return orders

    def work(self, orders: Orders) -> Ended:
        """The worker's part of it, and that the scheduler hears of it."""
        worker = self.worker
        worker.take_back(orders.preempted)
        worker.start_loads(orders)
        worker.start_saves(orders)
        worker.rest(orders)
        saved, loaded = worker.finished(orders)
        ended = Ended(saved, loaded, worker.failed_pages(), worker.done())
        if ended.done is not None:
            self.scheduler.heard(ended.done)
        return ended

    def step(self, *scheduled: tuple[Any, int]) -> Ended:
        return self.work(self.orders(scheduled))

    def idle_until(self, condition: Callable[[Ended], bool]) -> None:
        """Steps with nothing to compute, until one ends as wished."""
        for _ in range(2_000):
            if condition(self.step()):
                return
        raise AssertionError("it does not come to pass")

    def finish(self, name: str) -> None:
        """A request has finished, and its pages are kept until they are saved."""
        if name not in self.work(Orders(held={name}, is_idle=True)).saved:
            self.idle_until(lambda ended: name in ended.saved)

    def found(self, asked: Any, start: int = 0) -> int:
        """What `matched` says in the end."""
        for _ in range(2_000):
            tokens = self.scheduler.matched(asked, start)
            if tokens is not None:
                return tokens
            self.step()
        raise AssertionError("no answer came")

    def allocate(self, asked: Any, tokens: int) -> None:
        """As vLLM does before it loads."""
        self.scheduler.allocated(asked, TABLE, tokens)
        asked.num_computed_tokens = tokens

    def close(self) -> None:
        self.worker.close()
        self.scheduler.close()


@contextmanager
def rig_of(store: Store, role: str = "kv_both") -> Iterator[Rig]:
    rig = Rig(store, role)
    try:
        yield rig
    finally:
        rig.close()


@contextmanager
def gated_store(path: Path) -> Iterator[StoreRig]:
    """A store whose NVMe tier waits or fails when it is told to."""
    rig = StoreRig(path / "nvme", clock=RunningClock())
    try:
        yield rig
    finally:
        rig.finish()

"""The vLLM connector's questions to a store: for how long an answer is waited for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path

import pytest

import kvstore
from kvstore.connectors.accounts import Accounts
from kvstore.connectors.connector import DEADLINE_S, Connector
from kvstore.connectors.vllm_lookups import LATE_S, Lookups
from kvstore.hashing import TokenChain
from kvstore.planner import DEADLINE_SLACK, LinearCost
from tests.connectors.memory import NAMESPACE
from tests.connectors.vllm_rig import gated_store
from tests.daemon.doors import Daemon
from tests.store.rig import put

TOKENS = list(range(400))
CHAIN = TokenChain(NAMESPACE, TOKENS).chain()


@pytest.fixture
def lookups() -> Iterator[Lookups]:
    lookups = Lookups(Accounts())
    yield lookups
    lookups.close()
    lookups.join()


def ask(lookups: Lookups, connector: Connector, tokens: Sequence[int]) -> tuple[int, int]:
    """The answer, and how often it was asked for."""
    chain = TokenChain(connector.namespace, tokens).chain()
    question = lookups.ask(connector, chain, 0)
    for asked in range(1, 10_000):
        wait([question.future], 0.01)
        answer = lookups.answer(question, 0.0)
        if answer is not None:
            return answer, asked
    raise AssertionError("no answer came")


def test_what_is_on_nvme_is_in_ram_when_the_answer_comes(tmp_path: Path, lookups: Lookups) -> None:
    nvme = {"nvme_path": tmp_path / "nvme", "nvme_bytes": "16 MiB"}
    with kvstore.open(ram_bytes="1 MiB", **nvme) as store:
        put(store, CHAIN)
        assert store.flush(30)
    with kvstore.open(ram_bytes="1 MiB", **nvme) as store, Connector(store, NAMESPACE) as connector:
        assert store.probe(CHAIN).tiers == ["nvme"] * 25
        answer, asked = ask(lookups, connector, TOKENS)
        assert answer == 400
        assert asked > 1
        assert store.probe(CHAIN).tiers == ["ram"] * 25


def test_a_store_that_does_not_answer_is_not_asked_again(tmp_path: Path) -> None:
    accounts = Accounts()
    lookups = Lookups(accounts)
    with (
        kvstore.open(ram_bytes="1 MiB") as store,
        Daemon(store, tmp_path / "s") as daemon,
        kvstore.connect(daemon.url, timeout_s=LATE_S * 4) as client,
        Connector(client, NAMESPACE, accounts=accounts) as connector,
    ):
        put(store, CHAIN)
        with daemon.wedged():
            assert ask(lookups, connector, TOKENS)[0] == 0
            assert accounts.stats().counters["late_lookups"] == 1
            assert ask(lookups, connector, TOKENS) == (0, 1)
        lookups.close()
        lookups.join()


def test_a_step_waits_once_whoever_asks(tmp_path: Path, lookups: Lookups) -> None:
    with (
        kvstore.open(ram_bytes="1 MiB") as store,
        Daemon(store, tmp_path / "s") as daemon,
        daemon.connect() as client,
        Connector(client, NAMESPACE) as connector,
    ):
        with daemon.wedged():
            questions = [lookups.ask(connector, CHAIN, 0) for _ in range(20)]
            for waited in (1, 2):
                lookups.step_begins()
                for _ in range(2):
                    assert [lookups.answer(each, 0.0) for each in questions] == [None] * 20
                assert sum(each.had_grace for each in questions) == waited
        lookups.close()
        lookups.join()


@pytest.mark.parametrize(
    ("prefill", "patience_s"),
    [(LinearCost(), DEADLINE_S), (LinearCost.of(0.01, 0, 1), 4 * DEADLINE_SLACK)],
    ids=["speed not known", "10 ms a token"],
)
def test_a_prefetch_is_waited_for_as_long_as_computing_would_take(
    prefill: LinearCost, patience_s: float, tmp_path: Path, lookups: Lookups
) -> None:
    with (
        gated_store(tmp_path) as below,
        Connector(below.store, NAMESPACE, prefill=prefill) as connector,
    ):
        below.store_below(CHAIN)
        put(below.store, CHAIN.slice(0, 4))
        below.gate.hold("read")
        question = lookups.ask(connector, CHAIN, 0)
        question.future.result()
        assert lookups.answer(question, patience_s - 0.1) is None
        question.future.result()
        assert lookups.answer(question, patience_s + 0.1) == 64

"""The connector's class, called as vLLM calls it, where no model is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.workers.lines import Worker
from tests.engines.conftest import VLLM_ENVIRONMENT

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def connector(vllm_python: Path) -> Iterator[Worker]:
    with Worker(
        vllm_python, "tests.engines.vllm_connector_process", env=VLLM_ENVIRONMENT
    ) as worker:
        yield worker


def test_it_works_when_all_workers_do(connector: Worker) -> None:
    answer = connector.ask("introduced", reasons=[None, None])
    assert answer == {"lines": [], "works": True}


@pytest.mark.parametrize(
    ("reasons", "said"),
    [
        ([None, "no such layout"], "no such layout"),
        (["no such layout", "no such layout"], "no such layout"),
        ([None], "1 of 2 workers have said nothing"),
    ],
)
def test_workers_that_refuse_are_said_once(
    reasons: list[str | None], said: str, connector: Worker
) -> None:
    answer = connector.ask("introduced", reasons=reasons)
    assert answer == {"lines": [f"WARNING kvstore: running without it: {said}"], "works": False}


def test_a_worker_tells_its_reason_and_leaves_the_log_to_the_scheduler(connector: Worker) -> None:
    answer = connector.ask("refused")
    assert "meta" in answer["reason"]
    assert answer["lines"] == []
    assert answer["is_vllms"]


def test_what_was_forgotten_stays_so_when_vllm_wakes_up(connector: Worker) -> None:
    assert connector.ask("woken") == [True, False]


def test_what_is_not_understood_is_said_and_ends_nothing(connector: Worker) -> None:
    answer = connector.ask("broken")
    (line,) = answer.pop("lines")
    assert "running without it from now on" in line
    assert answer == {"matched": [0, False], "saves": [], "reset": True, "held": False}


def test_who_misses_events_is_told_what_there_is(connector: Worker) -> None:
    assert connector.ask("fallen_behind") == [
        ["BlockStored", "CPU", 4],
        ["AllBlocksCleared", None, 0],
        ["BlockStored", "CPU", 4],
        ["BlockStored", "CPU", 12],
        ["BlockRemoved", "CPU", 4],
        ["AllBlocksCleared", None, 0],
    ]

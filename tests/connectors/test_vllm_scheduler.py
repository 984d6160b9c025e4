"""What the vLLM connector's scheduler side orders, and which pages it has vLLM keep."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvstore.connectors.vllm_jobs import Done
from kvstore.hashing import TokenChain
from kvstore.planner import DEADLINE_SLACK
from kvstore.store import BlockStore
from tests.connectors.memory import NAMESPACE, TABLE, TOKENS
from tests.connectors.vllm_rig import Rig, request, rig_of

STORED = len(TOKENS) // 16 * 16
CHAIN = TokenChain(NAMESPACE, TOKENS).chain()


@pytest.fixture
def rig(block_store: BlockStore) -> Iterator[Rig]:
    with rig_of(block_store) as rig:
        yield rig


def preempt(asked: object) -> None:
    asked.num_computed_tokens = 0  # type: ignore[attr-defined]


def compute(rig: Rig, name: str) -> None:
    """A prompt from its first token to the end, until all of it is stored."""
    asked = request(name)
    assert rig.found(asked) == 0
    rig.step((asked, len(TOKENS)))
    if rig.scheduler.finished(name):
        rig.idle_until(lambda ended: name in ended.saved)


def test_what_was_computed_is_loaded(rig: Rig, block_store: BlockStore) -> None:
    compute(rig, "a")
    assert block_store.probe(CHAIN).prefix == len(CHAIN)
    kv = rig.memory.kv(TABLE, range(STORED))
    for part in rig.memory.tensors:
        part.zero_()
    again = request("b")
    assert rig.found(again) == STORED
    rig.allocate(again, STORED)
    rig.idle_until(lambda ended: "b" in ended.loaded)
    assert rig.memory.kv(TABLE, range(STORED)) == kv


def test_pages_of_a_request_that_is_dropped_while_it_is_loaded_are_not_kept(rig: Rig) -> None:
    """vLLM keeps them itself until the load is done; it cannot be told twice."""
    compute(rig, "a")
    asked = request("b")
    assert rig.found(asked, len(TOKENS)) == 0
    asked.num_computed_tokens = 0
    rig.orders([(asked, len(TOKENS))])  # a save is ordered, and does not end
    preempt(asked)
    rig.allocate(asked, rig.found(asked))
    assert not rig.scheduler.finished("b")
    assert not rig.orders().held


def test_pages_of_one_that_was_loaded_and_then_computed_are_kept(rig: Rig) -> None:
    compute(rig, "a")
    asked = request("b", [*TOKENS, *range(32)])
    rig.allocate(asked, rig.found(asked))
    rig.idle_until(lambda ended: "b" in ended.loaded)
    rig.orders([(asked, len(TOKENS) + 32 - STORED)])
    assert rig.scheduler.finished("b")
    assert rig.orders().held == {"b"}


def test_what_is_under_way_when_all_is_forgotten_is_not_stored(
    rig: Rig, block_store: BlockStore
) -> None:
    """Its first pages are those of the old weights."""
    asked = request("a")
    assert rig.found(asked) == 0
    assert rig.orders([(asked, 64)]).saves
    rig.scheduler.forget(True)
    assert not rig.orders([(asked, 64)]).saves
    preempt(asked)
    assert rig.found(asked) == 0
    (save,) = rig.orders([(asked, 64)]).saves
    assert (save.base + save.start, save.stop) == (0, 64)
    assert save.chain.namespace != NAMESPACE


def test_pages_are_kept_while_they_are_saved_whatever_is_forgotten(rig: Rig) -> None:
    asked = request("a")
    rig.found(asked)
    rig.orders([(asked, 64)])
    asked.prompt_embeds = object()  # it would have no namespace any more
    rig.scheduler.forget(True)
    assert rig.scheduler.finished("a")


def test_what_is_being_loaded_when_all_is_forgotten_is_not_stored(rig: Rig) -> None:
    compute(rig, "a")
    asked = request("b", [*TOKENS, *range(32)])
    rig.allocate(asked, rig.found(asked))
    rig.scheduler.forget(True)
    rig.idle_until(lambda ended: "b" in ended.loaded)
    assert not rig.orders([(asked, len(TOKENS) + 32 - STORED)]).saves


def test_a_load_that_begins_after_all_is_forgotten_is_still_made(rig: Rig) -> None:
    """vLLM may ask for it steps after it was promised, and waits for it."""
    compute(rig, "a")
    asked = request("b")
    tokens = rig.found(asked)
    rig.scheduler.forget(True)
    rig.allocate(asked, tokens)
    rig.idle_until(lambda ended: "b" in ended.loaded)


def test_while_vllm_has_old_pages_what_begins_with_them_is_not_stored(rig: Rig) -> None:
    rig.scheduler.forget(True)
    asked = request("a")
    assert rig.found(asked, 32) == 0
    asked.num_computed_tokens = 32
    assert not rig.orders([(asked, 64)]).saves
    fresh = request("b")
    assert rig.found(fresh) == 0
    assert rig.orders([(fresh, 64)]).saves
    rig.scheduler.forget(False)
    asked = request("c")
    assert rig.found(asked, 32) == 0
    asked.num_computed_tokens = 32
    assert rig.orders([(asked, 64)]).saves


def test_what_was_dropped_is_saved_with_what_comes_next(rig: Rig) -> None:
    asked = request("a")
    rig.found(asked)
    rig.orders([(asked, 96)])
    rig.orders([(asked, 48)])
    rig.scheduler.heard(Done(dropped={"a": 32}).aggregate(Done(dropped={"a": 96})))
    (save,) = rig.orders([(asked, 16)]).saves
    assert (save.base + save.start, save.base + save.stop) == (32, 160)
    (save,) = rig.orders([(asked, 16)]).saves
    assert (save.base + save.start, save.base + save.stop) == (160, 176)


def test_a_load_may_take_as_long_as_computing_all_that_is_loaded(rig: Rig) -> None:
    compute(rig, "a")
    first = request("b")
    rig.allocate(first, rig.found(first))
    (load,) = rig.orders().loads
    seconds = 200 * 0.01 * DEADLINE_SLACK
    assert load.deadline_s is not None  # one prompt alone was computed, and timed
    rig.scheduler.finished("b")
    for _ in range(500):
        rig.scheduler._prefill.cost.observe(200, 0, 2.0)
    for name, waiting in [("c", 1), ("d", 2)]:
        asked = request(name)
        rig.allocate(asked, rig.found(asked))
        (load,) = rig.orders().loads
        assert load.deadline_s == pytest.approx(seconds * STORED / 200 * waiting, rel=0.01)
    rig.orders([(asked, 1)])  # it is there, and computed on
    last = request("e")
    rig.allocate(last, rig.found(last))
    (load,) = rig.orders().loads
    assert load.deadline_s == pytest.approx(seconds * STORED / 200 * 2, rel=0.01)


def test_idle_steps_do_not_keep_prompts_from_being_timed(rig: Rig) -> None:
    for _ in range(5):
        rig.orders()  # such a step may end without a word
    compute(rig, "a")
    assert rig.scheduler._prefill.cost.observations == 1


def test_an_adapter_is_read_beside_the_scheduler(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    weights = tmp_path / "adapter_model.bin"
    os.mkfifo(weights)  # whoever reads it waits until somebody writes
    lora = SimpleNamespace(lora_int_id=1, lora_path=str(tmp_path))
    asked = request("a", lora_request=lora)
    rig.scheduler.arrived(asked)
    assert rig.scheduler.matched(asked, 0) is None
    assert rig.orders().is_looking_up
    weights.write_bytes(b"weights")
    assert rig.found(asked) == 0
    (save,) = rig.orders([(asked, 64)]).saves
    assert save.chain.namespace.adapter


def test_an_adapter_that_takes_too_long_is_not_waited_for(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    weights = tmp_path / "adapter_model.bin"
    os.mkfifo(weights)
    lora = SimpleNamespace(lora_int_id=1, lora_path=str(tmp_path))
    asked = request("a", lora_request=lora)
    while rig.scheduler.matched(asked, 0) is None:
        rig.work(rig.orders())
    assert not rig.orders([(asked, 64)]).saves
    weights.write_bytes(b"weights")


@pytest.mark.parametrize(("role", "loads", "saves"), [("kv_producer", 0, 1), ("kv_consumer", 1, 0)])
def test_roles(role: str, loads: int, saves: int, rig: Rig, block_store: BlockStore) -> None:
    compute(rig, "a")
    with rig_of(block_store, role) as other:
        asked = request("b", [*TOKENS, *range(16)])
        found = other.found(asked)
        assert found == loads * STORED
        asked.num_computed_tokens = found
        assert len(other.orders([(asked, len(TOKENS) + 16 - found)]).saves) == saves

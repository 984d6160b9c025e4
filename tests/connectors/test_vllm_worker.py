"""The vLLM connector's worker side: loads and saves that vLLM need not wait for."""

from __future__ import annotations

import copy
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvstore.connectors.convert import Pages
from kvstore.connectors.vllm_jobs import Job, Orders
from kvstore.connectors.vllm_saves import LentPages, TakenBackError
from kvstore.hashing import TokenChain
from kvstore.store import BlockStore
from tests.connectors.memory import NAMESPACE, TABLE, TOKENS, Memory
from tests.connectors.vllm_rig import Ended, gated_store, rig_of
from tests.daemon.doors import Daemon
from tests.store.rig import PATIENCE_S

CHAIN = TokenChain(NAMESPACE, TOKENS).chain()


def job(start: int, stop: int, name: str = "a", deadline_s: float | None = None) -> Job:
    """Of the prompt in TABLE; what it begins with is its first token."""
    return Job(name, CHAIN, TABLE, 0, start, stop, deadline_s)


def test_pages_are_read_until_they_are_taken_back() -> None:
    memory = Memory()
    lent = LentPages(memory.pages)
    block = np.zeros(NAMESPACE.layout.block_bytes, np.uint8)
    lent.copy_out(TABLE, 16, [block.data], 16)
    assert block.tobytes() == memory.kv(TABLE, range(16, 32))
    lent.take_back()
    block[:] = 0
    with pytest.raises(TakenBackError):
        lent.copy_out(TABLE, 16, [block.data], 16)
    assert not block.any()


def test_pages_are_not_taken_back_while_a_block_is_copied() -> None:
    memory = Memory()
    copying, go_on, taken = threading.Event(), threading.Event(), threading.Event()

    class Slow(LentPages):
        def copy_out(self, *arguments: object) -> None:
            copying.set()
            assert go_on.wait(PATIENCE_S)

    lent = LentPages(Slow(memory.pages))
    blocks = [memoryview(bytearray(NAMESPACE.layout.block_bytes)) for _ in range(2)]

    def copy_out() -> None:
        with suppress(TakenBackError):  # before the second block, perhaps
            lent.copy_out(TABLE, 0, blocks, 16)

    def take_back() -> None:
        lent.take_back()
        taken.set()

    threads = [threading.Thread(target=copy_out), threading.Thread(target=take_back)]
    threads[0].start()
    assert copying.wait(PATIENCE_S)
    threads[1].start()
    assert not taken.wait(0.05)
    go_on.set()
    for thread in threads:
        thread.join()


def test_a_preemption_does_not_wait_for_the_store(tmp_path: Path, block_store: BlockStore) -> None:
    with (
        Daemon(block_store, tmp_path / "s") as daemon,
        daemon.connect() as client,
        rig_of(client) as rig,
    ):
        with daemon.wedged():
            rig.work(Orders(saves=[job(0, 96), job(96, 192)]))
            ended = rig.work(Orders(preempted={"a"}))
            # The first is with the daemon, which says nothing; the second was not begun.
            assert ended.done is not None
            assert ended.done.saves == {"a": 1}
        rig.finish("a")
    assert block_store.probe(CHAIN).prefix == 0


def test_a_preempted_request_is_saved_again(block_store: BlockStore) -> None:
    with rig_of(block_store) as rig:
        rig.work(Orders(saves=[job(0, 96)], preempted={"b"}))
        rig.work(Orders(saves=[job(0, 192)], preempted={"a"}))
        rig.worker.close()
        assert block_store.probe(CHAIN).prefix == len(CHAIN)


def test_a_save_that_is_dropped_is_told(tmp_path: Path, block_store: BlockStore) -> None:
    """Saves may wait for half of the pages: here 6 of 12, which are 12 blocks."""
    with (
        Daemon(block_store, tmp_path / "s") as daemon,
        daemon.connect() as client,
        rig_of(client) as rig,
    ):
        with daemon.wedged():
            saves = [job(0, 96), job(96, 192), job(32, 64, "b"), job(16, 32, "b")]
            done = rig.work(Orders(saves=saves)).done
            assert done is not None
            assert done.saves == {"b": 2}
            assert done.dropped == {"b": 16}
        counts = rig.worker.counts()
        assert counts is not None
        assert counts["counted"]["dropped_blocks"] == 3
        rig.worker.close()
    assert block_store.probe(CHAIN).prefix == len(CHAIN)


def test_one_save_that_is_larger_than_what_may_wait_is_made(block_store: BlockStore) -> None:
    with rig_of(block_store) as rig:
        long = TokenChain(NAMESPACE, range(320)).chain()
        rig.work(Orders(saves=[Job("a", long, list(range(10)), 0, 0, 320)]))
        rig.worker.close()
        assert block_store.probe(long).prefix == 20


class Followers(Pages):
    """Pages of a device, on which what is computed may take its time."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.step, self.follows = 0, -1
        self.seen: list[tuple[str, int]] = []  # of each copy: its way, and which step it follows

    def follow(self) -> Pages:
        followed = copy.copy(self)
        followed.follows = self.step
        return followed

    def copy_out(self, *arguments: Any) -> None:
        self.seen.append(("out", self.follows))
        super().copy_out(*arguments)

    def copy_in(self, *arguments: Any) -> None:
        self.seen.append(("in", self.follows))
        super().copy_in(*arguments)


def test_copies_follow_what_was_computed_in_their_own_step(
    tmp_path: Path, block_store: BlockStore
) -> None:
    with (
        Daemon(block_store, tmp_path / "s") as daemon,
        daemon.connect() as client,
        rig_of(client) as rig,
    ):
        pages = rig.worker.pages = Followers(rig.memory.layout, rig.memory.tensors)
        with daemon.wedged():  # so that no save is made before the last step
            for pages.step, tokens in enumerate([(0, 32), (32, 64), (64, 80)]):
                rig.work(Orders(saves=[job(*tokens)]))
        rig.finish("a")
        assert pages.seen == [("out", 0)] * 2 + [("out", 1)] * 2 + [("out", 2)]
        pages.seen.clear()
        pages.step = 3
        if "a" not in rig.work(Orders(loads=[job(0, 32)])).loaded:
            pages.step = 4
            rig.idle_until(lambda ended: "a" in ended.loaded)
        assert set(pages.seen) == {("in", 3)}


def test_a_load_ends_by_its_own_deadline(tmp_path: Path) -> None:
    with gated_store(tmp_path) as below, rig_of(below.store) as rig:
        below.store_below(CHAIN)
        below.gate.hold("read")
        rig.work(Orders(loads=[job(0, 192, deadline_s=0.01)]))
        failed: set[int] = set()

        def has_ended(ended: Ended) -> bool:
            failed.update(ended.failed_pages)
            return bool(ended.loaded)

        rig.idle_until(has_ended)
        assert failed == set(TABLE[:6])

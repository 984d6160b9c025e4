"""Tiers that are slow, full, damaged, closed or away: misses with a reason, and no error."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

import kvstore
from kvstore.connectors.accounts import Usage
from kvstore.connectors.connector import Connector, Found, Saved
from kvstore.hashing import TokenChain
from kvstore.planner import LinearCost
from kvstore.store import BlockStore
from kvstore.tier import Miss
from tests.connectors.memory import NAMESPACE, TABLE, TOKENS, Memory
from tests.daemon.doors import Daemon
from tests.store.rig import Rig, RunningClock


def test_from_nvme_it_comes_by_and_by(tmp_path: Path, source: Memory) -> None:
    rig = Rig(tmp_path / "nvme", clock=RunningClock())
    try:
        connector = Connector(rig.store, NAMESPACE)
        connector.save(TOKENS, TABLE, source.pages)
        chain = TokenChain(NAMESPACE, TOKENS).chain()
        assert rig.store.flush(30)
        rig.drop_from_ram(chain)
        assert connector.lookup(TOKENS) == Found(192, 0)

        rig.gate.hold("read")
        target = Memory(seed=1)
        load = connector.load(TOKENS, TABLE, target.pages)
        rig.gate.arrived("read")
        assert not load.poll()
        assert not load.wait(timeout_s=0)
        assert load.loaded_tokens == range(0)
        rig.gate.release()
        assert load.wait()
        assert load.usage == Usage(nvme_tokens=192, recomputed_tokens=8)
        assert target.kv(TABLE, range(192)) == source.kv(TABLE, range(192))
    finally:
        rig.finish()


def test_each_miss_has_its_own_reason(tmp_path: Path, source: Memory) -> None:
    """Of 12 blocks 8 are on NVMe; when computing is quicker than loading, none is worth it."""
    rig = Rig(tmp_path / "nvme", clock=RunningClock())
    try:
        connector = Connector(rig.store, NAMESPACE)
        connector.save(TOKENS[:128], TABLE, source.pages)
        assert rig.store.flush(30)
        rig.drop_from_ram(TokenChain(NAMESPACE, TOKENS[:128]).chain())
        assert connector.load(TOKENS[:16], TABLE, source.pages).wait()
        while not rig.store.load_costs["nvme"].observations:  # is known a moment later
            rig.run_in_background(asyncio.sleep(0))
        connector.prefill.observe(1000, 1000 * 500, 1e-9)
        load = connector.load(TOKENS, TABLE, source.pages, start_token=16)
        assert load.wait()
        assert load.loaded_tokens == range(16, 16)
        assert connector.stats().misses == {"too_slow": 7, "absent": 4}
    finally:
        rig.finish()


def test_prefetch_makes_it_ready(tmp_path: Path, source: Memory) -> None:
    rig = Rig(tmp_path / "nvme", clock=RunningClock())
    try:
        connector = Connector(rig.store, NAMESPACE)
        connector.save(TOKENS, TABLE, source.pages)
        assert rig.store.flush(30)
        rig.drop_from_ram(TokenChain(NAMESPACE, TOKENS).chain())
        assert connector.prefetch(TOKENS) == 12
        rig.until(rig.is_quiet)
        assert connector.lookup(TOKENS) == Found(192, 192)
        assert connector.prefetch(TOKENS) == 0
    finally:
        rig.finish()


def test_a_slow_tier_is_given_up_at_the_deadline(tmp_path: Path, source: Memory) -> None:
    clock = RunningClock()
    rig = Rig(tmp_path / "nvme", clock=clock)
    try:
        connector = Connector(rig.store, NAMESPACE)
        connector.save(TOKENS, TABLE, source.pages)
        assert rig.store.flush(30)
        rig.drop_from_ram(TokenChain(NAMESPACE, TOKENS).chain().slice(4))
        rig.gate.hold("read")
        target = Memory(seed=1)
        load = connector.load(TOKENS, TABLE, target.pages, stop_token=192, deadline_s=60)
        assert not load.poll()
        assert load.loaded_tokens == range(64)
        clock.now_s += 61
        assert load.wait()
        assert load.outcomes == [None] * 4 + [Miss.DEADLINE] * 8
        assert load.failed_pages == set(TABLE[2:6])
        assert connector.stats().misses == {"deadline": 8}
    finally:
        rig.finish()


def test_a_cancelled_load_writes_no_more(tmp_path: Path, source: Memory) -> None:
    rig = Rig(tmp_path / "nvme", clock=RunningClock())
    try:
        connector = Connector(rig.store, NAMESPACE)
        connector.save(TOKENS, TABLE, source.pages)
        assert rig.store.flush(30)
        rig.drop_from_ram(TokenChain(NAMESPACE, TOKENS).chain())
        rig.gate.hold("read")
        target = Memory(seed=1)
        before = target.bits()
        load = connector.load(TOKENS, TABLE, target.pages)
        load.cancel()
        rig.gate.release()
        assert load.poll()
        assert load.outcomes == [Miss.TOO_SLOW] * 12
        assert target.bits() == before
    finally:
        rig.finish()


def test_what_is_slower_than_computing_is_not_loaded(block_store: BlockStore) -> None:
    prefill = LinearCost.of(1e-9, 0.0, 10)  # computes a token in a nanosecond
    memory = Memory()
    connector = Connector(block_store, NAMESPACE, prefill=prefill)
    connector.save(TOKENS, TABLE, memory.pages)
    assert connector.lookup(TOKENS) == Found(192, 192)  # RAM costs nothing
    block_store._hub.costs["ram"] = LinearCost.of(1.0, 0.0, 10)  # a second to begin with
    assert connector.lookup(TOKENS) == Found(0, 0)
    load = connector.load(TOKENS, TABLE, memory.pages)
    assert load.is_done
    assert load.usage == Usage(recomputed_tokens=200)
    assert connector.stats().misses == {"too_slow": 12}


def test_a_closed_store_is_a_miss_said_once(
    block_store: BlockStore, source: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    connector = Connector(block_store, NAMESPACE)
    connector.save(TOKENS, TABLE, source.pages)
    begun = connector.load(TOKENS, TABLE, source.pages)
    block_store.close()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert begun.wait()
            assert begun.outcomes == [Miss.BREAKER] * 12
            assert connector.lookup(TOKENS) == Found(0, 0)
            assert connector.prefetch(TOKENS) == 0
            load = connector.load(TOKENS, TABLE, source.pages, stop_token=192)
            assert load.wait()
            assert load.outcomes == [Miss.BREAKER] * 12
            assert connector.save(TOKENS, TABLE, source.pages) == Saved(0, 0, 12)
    assert len(caplog.records) == 4  # one for each of the verbs
    assert connector.stats().counters["store_errors"] == 13


def test_a_daemon_that_dies_is_a_miss(
    block_store: BlockStore, source: Memory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, and without an error, whatever was under way; what was read stays right."""
    daemon = Daemon(block_store, tmp_path / "kvstore.sock")
    with daemon, daemon.connect() as client:
        connector = Connector(client, NAMESPACE)
        connector.save(TOKENS, TABLE, source.pages)
        target = Memory(seed=1)
        begun = connector.load(TOKENS, TABLE, target.pages)
        daemon.close()
        assert begun.wait()
        loaded = begun.loaded_tokens
        assert target.kv(TABLE, loaded) == source.kv(TABLE, loaded)
        with caplog.at_level(logging.CRITICAL):  # the client says once that it is away
            assert connector.lookup(TOKENS) == Found(0, 0)
            load = connector.load(TOKENS, TABLE, target.pages, stop_token=192)
            assert load.wait()
            assert load.outcomes == [Miss.ABSENT] * 12
            assert connector.save(TOKENS, TABLE, source.pages) == Saved(0, 0, 12)
            assert connector.save_behind(TOKENS, TABLE, source.pages).result() == Saved(0, 0, 12)
        connector.close()
        assert "store_errors" not in connector.stats().counters


def test_damaged_blocks_are_recomputed(source: Memory, tmp_path: Path) -> None:
    """Bits that flip on the disk: the load ends before them, with the reason."""
    sizes = {"ram_bytes": "1 MiB", "nvme_path": tmp_path, "nvme_bytes": "16 MiB"}
    with kvstore.open(**sizes) as store:
        Connector(store, NAMESPACE).save(TOKENS, TABLE, source.pages)
        assert store.flush(30)
    block = source.kv(TABLE, range(64, 80))
    (slab,) = [file for file in tmp_path.iterdir() if file.is_file() and block in file.read_bytes()]
    with slab.open("r+b") as file:
        file.seek(slab.read_bytes().index(block) + len(block) // 2)
        file.write(b"damage")
    with kvstore.open(**sizes) as store:
        connector = Connector(store, NAMESPACE)
        target = Memory(seed=1)
        load = connector.load(TOKENS, TABLE, target.pages, stop_token=192)
        assert load.wait()
        assert load.outcomes == [None] * 4 + [Miss.CHECKSUM] * 8
        assert target.kv(TABLE, range(64)) == source.kv(TABLE, range(64))
        assert connector.stats().misses == {"checksum": 8}


def test_a_full_store_refuses(source: Memory) -> None:
    rig = Rig(None, ram_blocks=2)  # of 8 KiB; a slot is 4 KiB at least
    try:
        connector = Connector(rig.store, NAMESPACE)
        assert connector.save(TOKENS, TABLE, source.pages) == Saved(4, 0, 8)
        assert connector.stats().counters["refused_blocks"] == 8
    finally:
        rig.finish()

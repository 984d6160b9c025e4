"""Look up, load, save: with any store, from pages to pages, and through the store's troubles."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import kvstore
from kvstore.connectors.accounts import Usage
from kvstore.connectors.connector import SAVES_BEHIND, Connector, Found, Saved
from kvstore.connectors.convert import Pages
from kvstore.connectors.page_layout import PageLayout
from kvstore.errors import LayoutError
from kvstore.hashing import TokenChain
from kvstore.identity import Namespace
from kvstore.layout import Shard
from kvstore.planner import LinearCost
from kvstore.store import BlockStore
from kvstore.tier import Miss
from kvstore.verbs import Store
from tests.connectors.pages import random_tensors, slow_block
from tests.daemon.doors import Daemon
from tests.store.rig import Rig, RunningClock

NAMESPACE = Namespace("tiny", "weights", "tokenizer", "bfloat16", 2, 4, 2, 16, "rope")
LAYOUT = PageLayout("KBNHD", 12, 32, 2, 4, 2, "bfloat16")
TOKENS = random.Random(0).choices(range(50_000), k=200)  # 12 full blocks of the store
TABLE = [7, 2, 9, 0, 11, 4, 3]


class Memory:
    """An engine's memory: its tensors, and the pages in them."""

    def __init__(self, layout: PageLayout = LAYOUT, seed: int = 0) -> None:
        self.layout = layout
        self.tensors = random_tensors(layout, seed)
        self.pages = Pages(layout, self.tensors)

    def kv(self, table: Sequence[int], tokens: range, shard: Shard | None = None) -> bytes:
        """What the tokens' KV is, read element by element."""
        return slow_block(self.layout, self.tensors, table, tokens, shard or self.layout.held)

    def bits(self) -> list[bytes]:
        return [tensor.view(torch.uint8).numpy().tobytes() for tensor in self.tensors]


@pytest.fixture
def source() -> Memory:
    return Memory()


@pytest.fixture
def target() -> Memory:
    """Another engine's: another layout, and other block sizes."""
    layout = PageLayout("LBHNKD", 30, 8, 2, 4, 2, "bfloat16")
    return Memory(layout, seed=1)


THERE = random.Random(1).sample(range(30), k=25)


def test_what_one_engine_saves_another_loads(store: Store, source: Memory, target: Memory) -> None:
    with Connector(store, NAMESPACE) as connector:
        assert connector.lookup(TOKENS) == Found(0, 0)
        assert connector.save(TOKENS, TABLE, source.pages) == Saved(12, 0, 0)
        assert connector.lookup(TOKENS) == Found(192, 192)
        assert connector.lookup(TOKENS[:-10]) == Found(176, 176)
        assert connector.lookup([1, *TOKENS]) == Found(0, 0)

        load = connector.load(TOKENS, THERE, target.pages)
        assert load.wait()
        assert load.loaded_tokens == range(192)
        assert load.outcomes == [None] * 12
        assert load.failed_pages == set()
        assert load.usage == Usage(ram_tokens=192, recomputed_tokens=8)
        assert target.kv(THERE, range(192)) == source.kv(TABLE, range(192))
        assert connector.save(TOKENS, TABLE, source.pages) == Saved(0, 12, 0)


def test_only_what_is_wanted_is_written(store: Store, source: Memory, target: Memory) -> None:
    """A start and a stop in the middle of blocks: the pages before belong to others too."""
    connector = Connector(store, NAMESPACE)
    connector.save(TOKENS, TABLE, source.pages)
    before = Memory(target.layout, seed=1)
    load = connector.load(TOKENS, THERE, target.pages, start_token=21, stop_token=99)
    assert load.wait()
    assert load.loaded_tokens == range(21, 99)
    assert load.usage == Usage(hbm_tokens=21, ram_tokens=78, recomputed_tokens=101)
    for tokens, expected in (
        (range(21), before.kv(THERE, range(21))),
        (range(21, 99), source.kv(TABLE, range(21, 99))),
        (range(99, 200), before.kv(THERE, range(99, 200))),
    ):
        assert target.kv(THERE, tokens) == expected
    assert connector.lookup(TOKENS, start_token=21) == Found(171, 171)
    assert connector.lookup(TOKENS, start_token=195) == Found(0, 0)


def test_a_chain_that_is_extended_is_hashed_once(store: Store, source: Memory) -> None:
    connector = Connector(store, NAMESPACE)
    chain = TokenChain(NAMESPACE, TOKENS[:100])
    assert connector.save(chain, TABLE, source.pages) == Saved(6, 0, 0)
    chain.extend(TOKENS[100:])
    assert connector.lookup(chain) == Found(96, 96)
    assert connector.save(chain, TABLE, source.pages, start_token=96) == Saved(6, 0, 0)
    assert connector.lookup(TOKENS) == Found(192, 192)
    with pytest.raises(LayoutError, match="another namespace"):
        connector.lookup(TokenChain(dataclasses.replace(NAMESPACE, salt="x"), TOKENS))


def test_saves_behind(store: Store, source: Memory) -> None:
    with Connector(store, NAMESPACE) as connector:
        futures = [
            connector.save_behind(TOKENS[: 16 * n], TABLE, source.pages) for n in range(1, 13)
        ]
    assert sum(future.result().stored for future in futures) == 12
    assert Connector(store, NAMESPACE).lookup(TOKENS) == Found(192, 192)
    late = connector.save_behind(TOKENS, TABLE, source.pages)
    assert late.result(0) == Saved(0, 0, 12)


def test_too_many_saves_behind_are_refused(block_store: BlockStore, source: Memory) -> None:
    with Connector(block_store, NAMESPACE) as connector, block_store._hub.lock:
        futures = [
            connector.save_behind(TOKENS, TABLE, source.pages) for _ in range(SAVES_BEHIND + 1)
        ]
        assert futures[-1].result(0) == Saved(0, 0, 12)
        assert not futures[-2].done()
    assert futures[-2].result(0) == Saved(0, 12, 0)
    assert connector.stats().counters["refused_blocks"] == 12


def test_other_namespaces_never_hit(store: Store, source: Memory, target: Memory) -> None:
    Connector(store, NAMESPACE).save(TOKENS, TABLE, source.pages)
    for field in ("weights", "adapter", "salt", "rope"):
        changed = {**dataclasses.asdict(NAMESPACE), field: "x"}
        other = Connector(store, Namespace(**changed))
        before = target.bits()
        assert other.lookup(TOKENS) == Found(0, 0)
        load = other.load(TOKENS, THERE, target.pages, stop_token=192)
        assert load.wait()
        assert load.outcomes == [Miss.ABSENT] * 12
        assert load.failed_pages == set(THERE[:24])
        assert target.bits() == before


def test_pages_of_another_shape_are_refused(store: Store, source: Memory) -> None:
    for change in ({"layers": 1}, {"head_dim": 1}, {"kv_heads": 2}, {"kv_dtype": "float16"}):
        connector = Connector(store, dataclasses.replace(NAMESPACE, **change))
        with pytest.raises(LayoutError):
            connector.save(TOKENS, TABLE, source.pages)
        with pytest.raises(LayoutError):
            connector.load(TOKENS, TABLE, source.pages)
    rank = Connector(store, NAMESPACE, heads=Shard(0, 2))
    with pytest.raises(LayoutError, match="heads"):
        rank.save(TOKENS, TABLE, source.pages)
    with pytest.raises(LayoutError):
        Connector(store, NAMESPACE, heads=Shard(0, 5))


def test_tables_that_are_too_short_are_refused(store: Store, source: Memory) -> None:
    connector = Connector(store, NAMESPACE)
    with pytest.raises(LayoutError):
        connector.save(TOKENS, TABLE[:2], source.pages)
    connector.save(TOKENS, TABLE, source.pages)
    with pytest.raises(LayoutError):
        connector.load(TOKENS, TABLE[:2], source.pages)
    with pytest.raises(LayoutError):
        connector.load(TOKENS, [-1] * 7, source.pages)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_every_tp_size_reads_every_other(store: Store, ranks: int, readers: int) -> None:
    """What a writer's ranks have saved, a reader's ranks load: byte by byte the same."""
    whole = Memory()
    everything = whole.kv(TABLE, range(192))
    for shard in NAMESPACE.layout.shards(ranks):
        pages = dataclasses.replace(LAYOUT, heads=shard)
        tensors = [
            tensor.view(*LAYOUT.shape)[:, :, :, shard.start : shard.stop].contiguous()
            for tensor in whole.tensors
        ]
        rank = Connector(store, NAMESPACE, heads=shard)
        assert rank.save(TOKENS, TABLE, Pages(pages, tensors)) == Saved(12, 0, 0)

    scheduler = Connector(store, NAMESPACE)
    assert scheduler.lookup(TOKENS) == Found(192, 192)
    read = b""
    for shard in NAMESPACE.layout.shards(readers):
        theirs = dataclasses.replace(LAYOUT, order="BHKND", keys_transposed=True, heads=shard)
        memory = Memory(theirs, seed=2)
        rank = Connector(store, NAMESPACE, heads=shard)
        assert rank.lookup(TOKENS) == Found(192, 192)
        assert rank.load(TOKENS, TABLE, memory.pages).wait()
        read += memory.kv(TABLE, range(192))
        assert rank.save(TOKENS, TABLE, memory.pages) == Saved(0, 12, 0)
    assert read == everything


def test_a_prefix_in_pieces_of_several_tp_sizes(store: Store, source: Memory) -> None:
    """One rank of two is missing from block 6 on, where another writer had whole blocks."""
    halves = NAMESPACE.layout.shards(2)
    for shard, tokens in zip(halves, (192, 96), strict=True):
        pages = Pages(
            dataclasses.replace(LAYOUT, heads=shard),
            [
                tensor.view(*LAYOUT.shape)[:, :, :, shard.start : shard.stop].contiguous()
                for tensor in source.tensors
            ],
        )
        Connector(store, NAMESPACE, heads=shard).save(TOKENS[:tokens], TABLE, pages)
    connector = Connector(store, NAMESPACE)
    assert connector.lookup(TOKENS) == Found(96, 96)
    assert connector.save(TOKENS, TABLE, source.pages) == Saved(6, 6, 0)
    target = Memory(seed=3)
    assert connector.load(TOKENS, TABLE, target.pages).wait()
    assert target.kv(TABLE, range(192)) == source.kv(TABLE, range(192))


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


def test_the_accounts_add_up(store: Store, source: Memory) -> None:
    connector = Connector(store, NAMESPACE)
    connector.save(TOKENS[:100], TABLE, source.pages)
    for start_token, stop_token in ((0, None), (32, None), (0, 160), (150, 160)):
        connector.load(
            TOKENS, TABLE, source.pages, start_token=start_token, stop_token=stop_token
        ).wait()
    stats = connector.stats()
    assert stats.usage == Usage(hbm_tokens=182, ram_tokens=96 + 64 + 96, recomputed_tokens=362)
    assert stats.usage.prompt_tokens == 4 * len(TOKENS)
    assert stats.misses == {"absent": 6 + 6 + 4 + 1}
    assert stats.counters["loads"] == 4
    assert stats.counters["loaded_blocks"] == 6 + 4 + 6

"""Look up, load, save: with any store, from pages to pages."""

from __future__ import annotations

import dataclasses
import random

import pytest

from kvstore.connectors.accounts import Accounts, Usage
from kvstore.connectors.connector import SAVES_BEHIND, Connector, Found, Saved
from kvstore.connectors.page_layout import PageLayout
from kvstore.errors import LayoutError
from kvstore.hashing import TokenChain
from kvstore.identity import Namespace
from kvstore.layout import Shard
from kvstore.store import BlockStore
from kvstore.tier import Miss
from kvstore.verbs import Store
from tests.connectors.memory import NAMESPACE, TABLE, TOKENS, Memory


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


def test_keys_alone_will_do(store: Store, source: Memory) -> None:
    """One process hashes, another moves: tokens are counted from where the keys begin."""
    accounts = Accounts()
    connector = Connector(store, NAMESPACE, accounts=accounts)
    chain = TokenChain(NAMESPACE, TOKENS).chain()
    assert connector.save(chain, TABLE, source.pages) == Saved(12, 0, 0)
    assert connector.lookup(TOKENS) == connector.lookup(chain) == Found(192, 192)
    target = Memory(seed=1)
    load = Connector(store, NAMESPACE, accounts=accounts).load(
        chain.slice(4), TABLE[2:], target.pages
    )
    assert load.wait()
    assert load.loaded_tokens == range(128)
    assert target.kv(TABLE, range(64, 192)) == source.kv(TABLE, range(64, 192))
    assert connector.save_behind(chain.slice(4), TABLE[2:], source.pages).result() == Saved(0, 8, 0)
    connector.close()
    counters = connector.stats().counters
    assert (counters["saved_blocks"], counters["loaded_blocks"]) == (12, 8)

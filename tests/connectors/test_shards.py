"""What ranks of one number have stored, ranks of every other number load."""

from __future__ import annotations

import dataclasses

import pytest

from kvstore.connectors.connector import Connector, Found, Saved
from kvstore.connectors.convert import Pages
from kvstore.verbs import Store
from tests.connectors.memory import LAYOUT, NAMESPACE, TABLE, TOKENS, Memory


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

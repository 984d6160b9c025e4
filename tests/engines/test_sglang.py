"""SGLang's host pools, storage factory and controller, and the backend between them."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvstore
from benchmarks.workers.lines import Worker
from kvstore.hashing import Chain
from kvstore.store import BlockStore
from tests.daemon.doors import Daemon, DaemonProcess
from tests.engine.tiny import tiny_model
from tests.engines.sglang_rank import NAMESPACE, SHAPE, Rank, all_of, chain_of, tokens_of

pytestmark = pytest.mark.engines

LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head", "page_unified"]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """Over a store in this process, which looks at the checksum of all that it gives out."""
    with (
        kvstore.open(ram_bytes="64 MiB", store_verify="always") as store,
        Daemon(store, tmp_path / "kvstore.sock") as daemon,
    ):
        yield daemon


def overwrite(store: BlockStore, chain: Chain) -> None:
    """Damage blocks behind the store's back."""
    with store.acquire(chain) as lease:
        assert lease.wait() == len(chain)
        for view in lease.views:
            memory = np.frombuffer(view, np.uint8)
            ctypes.memset(memory.ctypes.data, 0xAB, 64)


@pytest.mark.parametrize(
    ("dtype", "controller"),
    [
        ("bfloat16", "HybridCacheController"),
        ("float16", "HiCacheController"),
        ("float32", "HybridCacheController"),
    ],
)
def test_every_layout_reads_what_every_layout_wrote(
    sglang: Worker, daemon: Daemon, dtype: str, controller: str
) -> None:
    extra = {"namespace": json.loads(replace(NAMESPACE, kv_dtype=dtype).to_json())}
    same = {"dtype": dtype, "controller": controller, "extra": extra}
    for seed, writing in enumerate(LAYOUTS):
        tokens = tokens_of(100, seed)
        with Rank(sglang, daemon.url, layout=writing, **same) as rank:
            assert rank.prefetch(tokens) == [0, 0, 0]
            assert rank.backup(tokens) == 96
        for reading in LAYOUTS:
            with Rank(sglang, daemon.url, layout=reading, **same) as rank:
                assert rank.prefetch(tokens) == all_of(tokens)
                assert rank.ask("counters")["loaded_blocks"] == 6
    assert sglang.ask("said") == []


def test_pages_of_every_size_and_prompts_of_many_pages(sglang: Worker, daemon: Daemon) -> None:
    """SGLang asks for 128 pages at a time."""
    tokens = tokens_of(800)
    for page_size in (1, 4, 64):
        with Rank(sglang, daemon.url, page_size=page_size) as rank:
            assert rank.backup(tokens[:400]) == 400 // page_size * page_size
            full = 800 // page_size * page_size
            after = 256
            assert rank.backup(tokens, after=after) == full - after
            assert rank.prefetch(tokens) == [full] * 3
            assert rank.prefetch(tokens, after=after) == [full - after] * 3


def test_only_the_leading_run_is_found(sglang: Worker, daemon: Daemon) -> None:
    tokens = tokens_of(160)
    with Rank(sglang, daemon.url) as rank:
        rank.backup(tokens)
        chain = chain_of(rank, tokens)
        assert daemon.store.probe(chain).prefix == 10
        daemon.store.evict(chain.slice(3, 4))
        assert rank.ask("exists", tokens=tokens) == 3
        assert rank.prefetch(tokens) == [48, 48, 48]
        assert rank.prefetch(tokens, after=64) == [96, 96, 96]
        assert rank.prefetch(tokens[1:]) == [0, 0, 0]
        # It is stored anew, and what is there already is not copied.
        assert rank.backup(tokens) == 160
        assert rank.prefetch(tokens) == all_of(tokens)
        assert rank.ask("counters")["saved_blocks"] == 11


def test_damaged_pages_are_not_served(sglang: Worker, daemon: Daemon) -> None:
    tokens = tokens_of(160)
    with Rank(sglang, daemon.url) as rank:
        rank.backup(tokens)
        overwrite(daemon.store, chain_of(rank, tokens).slice(4, 5))
        assert rank.prefetch(tokens) == [160, 64, 64]
        assert rank.ask("misses")["checksum"] > 0


def test_ranks_are_shards_that_other_numbers_of_ranks_read(sglang: Worker, daemon: Daemon) -> None:
    """Eight ranks of four heads hold each of them twice."""
    for seed, writers in enumerate((1, 2, 4, 8)):
        tokens = tokens_of(70, seed)
        for number in range(writers):
            with Rank(sglang, daemon.url, rank=number, ranks=writers) as rank:
                found = rank.prefetch(tokens)
                assert found == ([64] * 3 if writers == 8 and number % 2 else [0, 0, 0])
                assert rank.backup(tokens) == 64
        for readers in (1, 2, 4, 8):
            for number in range(readers):
                layout = LAYOUTS[number % 3]
                with Rank(sglang, daemon.url, rank=number, ranks=readers, layout=layout) as rank:
                    assert rank.prefetch(tokens) == all_of(tokens)


def test_other_identities_find_nothing(sglang: Worker, daemon: Daemon) -> None:
    tokens = tokens_of(70)
    with Rank(sglang, daemon.url) as rank:
        assert rank.backup(tokens, salt="a tenant") == 64
        assert rank.prefetch(tokens) == [0, 0, 0]
        assert rank.prefetch(tokens, salt="another") == [0, 0, 0]
        assert rank.prefetch(tokens, salt="a tenant") == all_of(tokens)
        assert rank.backup(tokens) == 64
    other = json.loads(replace(NAMESPACE, weights="others").to_json())
    for extra in ({"salt": "ours"}, {"namespace": other}):
        with Rank(sglang, daemon.url, extra=extra) as rank:
            assert rank.prefetch(tokens) == [0, 0, 0]
    with Rank(sglang, daemon.url, page_size=8) as rank:
        assert rank.prefetch(tokens) == [0, 0, 0]


def test_a_daemon_that_is_killed_is_a_miss(sglang: Worker, tmp_path: Path) -> None:
    tokens = tokens_of(70)
    daemon = DaemonProcess(tmp_path, "--ram-bytes", "64 MiB")
    with Rank(sglang, daemon.url) as rank:
        assert rank.backup(tokens) == 64
        assert rank.prefetch(tokens) == all_of(tokens)
        daemon.kill()
        # It was found, and then it was gone.
        assert rank.ask("get", tokens=tokens, places=list(range(64))) == [False] * 4
        assert rank.prefetch(tokens) == [0, 0, 0]
        assert rank.backup(tokens) == 0
        assert len(sglang.ask("said")) == 1
    with Rank(sglang, daemon.url) as rank:  # started while there is none
        assert rank.prefetch(tokens) == [0, 0, 0]
        assert rank.backup(tokens) == 0
        assert len(sglang.ask("said")) == 1


def test_a_store_without_room_keeps_what_it_can(sglang: Worker, tmp_path: Path) -> None:
    tokens = tokens_of(800)  # 2.4 MB of them
    wide = {"namespace": json.loads(replace(NAMESPACE, head_dim=64).to_json())}
    with (
        kvstore.open(ram_bytes="1 MiB") as store,
        Daemon(store, tmp_path / "kvstore.sock") as daemon,
        Rank(sglang, daemon.url, shape=[3, 4, 64], extra=wide) as rank,
    ):
        assert rank.backup(tokens) == 0  # of a batch, SGLang counts all or nothing
        found = rank.ask("exists", tokens=tokens)
        assert 0 < found < 50
        assert rank.prefetch(tokens) == [found * 16] * 3


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"is_mla": True}, "MLATokenToKVPoolHost"),
        ({"dtype": "float8_e5m2"}, "uint8"),
        ({"dtype": "float16"}, "float16"),
        ({"shape": [2, 4, 8]}, "layers=2"),
        ({"shape": [3, 2, 8]}, "2 heads"),
        ({"ranks": 3}, "3 ranks"),
        ({"extra": {"interface_v1": 0}}, "interface_v1"),
        ({"extra": {"namespace": None}}, "give `model` or `namespace`"),
        ({"extra": {"namespace": None}, "model_name": "nobody/nothing"}, "nobody/nothing"),
        ({"extra": {"namespace": None, "model": "/nowhere at all"}}, "/nowhere at all"),
        ({"extra": {"namespace": None, "model": "tests"}}, "tests"),
    ],
)
def test_what_is_not_known_is_said_once_and_never_hits(
    sglang: Worker, daemon: Daemon, arguments: dict[str, Any], reason: str
) -> None:
    tokens = tokens_of(70)
    with Rank(sglang, daemon.url) as rank:
        assert rank.backup(tokens) == 64
    with Rank(sglang, daemon.url, **arguments) as rank:
        assert rank.ask("exists", tokens=tokens) == 0
        assert not any(rank.ask("get", tokens=tokens, places=list(range(64))))
        assert not any(rank.ask("put", tokens=tokens_of(70, 1), places=list(range(64))))
        (line,) = sglang.ask("said")
        assert line.startswith("kvstore: running without it: ")
        assert reason in line


def test_a_hybrid_model_is_not_half_loaded(sglang: Worker, daemon: Daemon) -> None:
    tokens = tokens_of(70)
    with Rank(sglang, daemon.url) as rank:
        rank.backup(tokens)
        assert rank.ask("others", tokens=tokens) == [
            None, [None] * 4, False, False, 0, [False], [False]
        ]  # fmt: skip
        rank.ask("second_pool")
        assert rank.prefetch(tokens) == [0, 0, 0]
        (line,) = sglang.ask("said")
        assert "its host pool mamba is not known" in line


def test_places_that_are_no_pages_are_misses(sglang: Worker, daemon: Daemon) -> None:
    tokens = tokens_of(64)
    places = list(range(64))
    wrong = [places[1:], places[::-1], [p + 1 for p in places], [p + 16_000 for p in places]]
    with Rank(sglang, daemon.url) as rank:
        rank.backup(tokens)
        for indices in wrong:
            assert rank.ask("get", tokens=tokens, places=indices) == [False] * 4
            assert rank.ask("put", tokens=tokens_of(64, 1), places=indices) == [False] * 4
        assert len(sglang.ask("said")) == 1
        assert rank.prefetch(tokens) == all_of(tokens)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({}, "names no store"),
        ({"ram_bytes": "1 lot"}, "lot"),
        ({"url": "nowhere"}, "nowhere"),
        ({"ram_bytes": "1 MiB", "salt": 1}, "salt must be a text"),
        ({"ram_bytes": "1 MiB", "block_tokens": 16}, "--page-size"),
        ({"ram_bytes": "1 MiB", "namespace": "?"}, "namespace"),
    ],
)
def test_settings_that_cannot_be_are_told_at_the_start(
    sglang: Worker, extra: dict[str, Any], reason: str
) -> None:
    extra = {"namespace": json.loads(NAMESPACE.to_json()), **extra}
    refused = sglang.ask("refused", extra=extra, shape=SHAPE)
    assert refused.startswith("SettingsError")
    assert reason in refused


def test_a_models_folder_is_its_identity(sglang: Worker, daemon: Daemon, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    namespace = kvstore.model_namespace(folder, dtype="bfloat16", block_tokens=16)
    shape = [namespace.layers, namespace.kv_heads, namespace.head_dim]
    tokens = tokens_of(70)
    extra: dict[str, Any] = {"namespace": None}
    with Rank(sglang, daemon.url, extra=extra, shape=shape, model_name=str(folder)) as rank:
        assert rank.backup(tokens) == 64
        assert daemon.store.probe(chain_of(rank, tokens, namespace)).prefix == 4
    extra |= {"model": str(folder)}
    with Rank(sglang, daemon.url, extra=extra, shape=shape, model_name="served as") as rank:
        assert rank.prefetch(tokens) == all_of(tokens)
    extra |= {"model": str(tiny_model(tmp_path / "other", seed=1))}
    with Rank(sglang, daemon.url, extra=extra, shape=shape) as rank:
        assert rank.prefetch(tokens) == [0, 0, 0]

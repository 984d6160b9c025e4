"""KV events in vLLM's schema: what a router learns from them is what the store holds."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import msgspec
import pytest
import zmq

from kvstore.daemon import zmq_door
from kvstore.daemon.service import Limits
from kvstore.daemon.vllm_schema import KVEventBatch, translate
from kvstore.daemon.zmq_door import ZmqDoor
from kvstore.errors import SettingsError
from kvstore.events import Cleared, Event, Removed, Stored
from kvstore.feed import Table
from kvstore.hashing import Key
from tests.cli.commands import kvstore
from tests.daemon.conftest import MakeProcess
from tests.daemon.doors import Daemon
from tests.daemon.vllm_router import PATIENCE_MS, Batch, Router, addresses
from tests.daemon.vllm_router import Cleared as VllmCleared
from tests.daemon.vllm_router import Stored as VllmStored
from tests.store.rig import NAMESPACE, PATIENCE_S, Rig, chain, put

ROOT = NAMESPACE.fingerprint
FRESH = count(1000)  # prompts that nobody has used


@contextmanager
def publishing(daemon: Daemon, folder: Path) -> Iterator[tuple[str, str]]:
    """The addresses of a door of the daemon's, open for as long as the block."""
    publish, replay = addresses(folder)
    door = daemon.call(lambda: ZmqDoor(daemon.service, publish, replay))
    try:
        yield publish, replay
    finally:
        daemon.run(door.close())


def truth(rig: Rig) -> dict[str, dict[Key, Key | None]]:
    """What a router should know when nothing moves."""
    found: dict[str, dict[Key, Key | None]] = {"CPU": {}, "STORAGE": {}}
    tiers: list[Table] = [rig.ram, rig.nvme]
    for medium, tier in zip(found, tiers, strict=True):
        with tier.lock:
            index = tier.slots.index
            for key, row in index.rows_by_key.items():
                parent = index.parents[row]
                found[medium][key] = None if parent == tier.slots.namespace(row) else parent
    return found


def settle(rig: Rig) -> None:
    assert rig.store.flush(PATIENCE_S)
    rig.until(rig.is_quiet)


def join(rig: Rig, router: Router) -> None:
    """Write until the router hears of it: how long ZeroMQ takes to connect is its own affair."""
    while not router.hears(20):
        put(rig.store, chain(1, next(FRESH)))
    router.receive()


def catch_up(rig: Rig, router: Router) -> None:
    """Receive until what is known is what is held."""
    settle(rig)
    last = chain(1, next(FRESH))
    put(rig.store, last)
    settle(rig)
    wanted = truth(rig)
    while {medium: router.held[medium] for medium in wanted} != wanted:
        router.receive()


# ---- the schema


def encoded(*events: Event) -> bytes:
    known = {ROOT: NAMESPACE, b"adapted": replace(NAMESPACE, adapter="lora", block_tokens=32)}
    return msgspec.msgpack.encode(KVEventBatch(1.5, list(translate(events, known.get)), 0))


def test_every_byte_is_as_vllm_would_write_it() -> None:
    blocks = chain(3)
    payload = encoded(
        Stored("ram", ROOT, list(blocks.keys), [ROOT, *blocks.keys[:-1]]),
        Removed("nvme", ROOT, [blocks.keys[2]]),
        Cleared(),
    )
    assert msgspec.msgpack.decode(payload) == [
        1.5,
        [
            {
                "type": "BlockStored",
                "block_hashes": list(blocks.keys),
                "parent_block_hash": None,
                "token_ids": [],
                "block_size": 16,
                "lora_id": None,
                "medium": "CPU",
                "lora_name": None,
                "locality": "LOCAL",
            },
            {
                "type": "BlockRemoved",
                "block_hashes": [blocks.keys[2]],
                "medium": "STORAGE",
                "locality": "LOCAL",
            },
            {"type": "AllBlocksCleared"},
        ],
        0,
    ]


def test_a_block_in_the_middle_names_its_parent_and_a_fork_is_told_apart() -> None:
    one, two, three, four = (b"%016d" % n for n in range(4))
    (event,) = msgspec.msgpack.decode(
        encoded(Stored("nvme", ROOT, [two], [one])), type=Batch
    ).events
    assert isinstance(event, VllmStored)
    assert (event.parent_block_hash, event.medium) == (one, "STORAGE")
    fork = Stored("ram", ROOT, [two, three, four], [one, two, two])
    events = msgspec.msgpack.decode(encoded(fork), type=Batch).events
    assert [(e.parent_block_hash, e.block_hashes) for e in events if isinstance(e, VllmStored)] == [
        (one, [two, three]),
        (two, [four]),
    ]


def test_an_adapter_stands_for_a_lora_and_what_is_not_known_is_left_open() -> None:
    stored = [Stored("ram", name, [b"k" * 16], [name]) for name in (b"adapted", b"unheard of")]
    known, unknown = msgspec.msgpack.decode(encoded(*stored), type=Batch).events
    assert isinstance(known, VllmStored)
    assert isinstance(unknown, VllmStored)
    assert (known.lora_name, known.block_size) == ("lora", 32)
    assert (unknown.lora_name, unknown.block_size) == (None, 0)


def test_a_long_prompt_is_cut_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.daemon.vllm_schema.RUN_BLOCKS", 10)
    blocks = chain(25)
    payload = encoded(Stored("ram", ROOT, list(blocks.keys), [ROOT, *blocks.keys[:-1]]))
    events = msgspec.msgpack.decode(payload, type=Batch).events
    parts = [
        (e.parent_block_hash, len(e.block_hashes)) for e in events if isinstance(e, VllmStored)
    ]
    assert parts == [(None, 10), (blocks.keys[9], 10), (blocks.keys[19], 5)]


# ---- the sockets


def test_a_router_knows_what_the_store_holds(rig: Rig, daemon: Daemon, tmp_path: Path) -> None:
    put(rig.store, chain(10))  # before anyone listens
    settle(rig)
    dice = random.Random(7)
    with publishing(daemon, tmp_path) as (publish, replay), Router(publish, replay) as router:
        join(rig, router)
        assert isinstance(router.batches[0].events[0], VllmCleared)
        for _ in range(300):
            blocks = chain(dice.randrange(1, 20), dice.randrange(30))
            if dice.random() < 0.7:
                put(rig.store, blocks)
            elif dice.random() < 0.5:
                rig.store.evict(blocks)
            else:
                rig.store.prefetch(blocks)
            if dice.random() < 0.2:
                settle(rig)
        catch_up(rig, router)
        assert rig.ram.slots.evicted_blocks > 300


def test_what_was_missed_is_sent_again_from_any_number(
    rig: Rig, daemon: Daemon, tmp_path: Path
) -> None:
    with publishing(daemon, tmp_path) as (publish, replay), Router(publish, replay) as router:
        join(rig, router)
        catch_up(rig, router)
        numbers = [number for number, _ in router.replayed(0)]
        assert numbers == list(range(len(numbers)))
        assert [number for number, _ in router.replayed(3)] == numbers[3:]
        assert router.replayed(len(numbers)) == []


def test_what_is_kept_for_that_is_bounded(
    rig: Rig, daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zmq_door, "REPLAYED_BATCHES", 5)
    with publishing(daemon, tmp_path) as (publish, replay), Router(publish) as router:
        with Router(publish, replay) as asking:
            while len(asking.replayed(0)) < 5 or asking.replayed(0)[0][0] == 0:
                put(rig.store, chain(1, next(FRESH)))
                settle(rig)
            assert len(asking.replayed(0)) == 5
        assert router.batches == []


def test_a_publisher_that_falls_behind_begins_anew(
    rig: Rig, daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon.service, "limits", Limits(event_log_blocks=16))
    with publishing(daemon, tmp_path) as (publish, replay), Router(publish, replay) as router:
        join(rig, router)
        before = len(router.batches)
        daemon.call(lambda: [put(rig.store, chain(10, next(FRESH))) for _ in range(5)])
        catch_up(rig, router)
        events = [event for batch in router.batches[before:] for event in batch.events]
        assert any(isinstance(event, VllmCleared) for event in events)


def test_a_request_that_makes_no_sense_is_no_end(rig: Rig, daemon: Daemon, tmp_path: Path) -> None:
    with publishing(daemon, tmp_path) as (publish, replay), Router(publish, replay) as router:
        with zmq.Context() as context, context.socket(zmq.DEALER) as asking:
            asking.setsockopt(zmq.LINGER, 0)
            asking.connect(replay)
            for frames in ([b"what?"], [b"", b"short"], [b"", b"", b"", b""]):
                asking.send_multipart(frames)
            asking.send_multipart([b"", (0).to_bytes(8)])
            assert asking.poll(PATIENCE_MS)
        join(rig, router)
        catch_up(rig, router)


def test_two_publishers_cannot_share_an_address(daemon: Daemon, tmp_path: Path) -> None:
    def open_on(address: str, replay: str | None = None) -> None:
        daemon.call(lambda: ZmqDoor(daemon.service, address, replay))

    door = daemon.call(lambda: ZmqDoor(daemon.service, "tcp://127.0.0.1:*", None))
    assert door.address.startswith("tcp://127.0.0.1:")
    with pytest.raises(
        SettingsError, match=r"daemon.zmq = tcp://127.*cannot listen there: Address"
    ):
        open_on(door.address)
    with pytest.raises(SettingsError, match=r"daemon.zmq_replay = tcp://127.*cannot listen there"):
        open_on(addresses(tmp_path)[0], door.address)
    with pytest.raises(SettingsError, match=r"daemon.zmq = nonsense: cannot listen there"):
        open_on("nonsense")
    daemon.run(door.close())


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:*", "tcp://*:5557", "tcp://[::]:5557"])
def test_an_address_for_everyone_is_refused(daemon: Daemon, address: str) -> None:
    with pytest.raises(SettingsError, match="opens to this machine only"):
        daemon.call(lambda: ZmqDoor(daemon.service, address, None))


# ---- the whole daemon


def test_a_real_daemon_publishes_and_says_when_it_ends(
    make_process: MakeProcess, tmp_path: Path
) -> None:
    publish, replay = addresses(tmp_path)
    flags = ("--set", f"daemon.zmq={publish}", "--set", f"daemon.zmq_replay={replay}")
    process = make_process(*flags)
    with process.connect() as client, Router(publish, replay) as router:
        blocks = chain(5)
        put(client, blocks)
        while not router.hears(20):
            put(client, chain(1, next(FRESH)))
        while not set(blocks.keys) <= set(router.held["STORAGE"]):
            router.receive()
        assert set(blocks.keys) <= set(router.held["CPU"])
        assert process.end() == 0
        while router.hears(200):
            router.receive()
        assert dict(router.held) == {}
    with Router(publish, replay) as router:
        process = make_process(*flags)
        with process.connect() as client:
            while not router.hears(20):
                put(client, chain(1, next(FRESH)))
        router.receive()
        while not set(blocks.keys) <= set(router.held["STORAGE"]):
            router.receive()  # they survived
        assert not set(blocks.keys) & set(router.held["CPU"])
        assert process.end() == 0


def test_without_pyzmq_a_daemon_says_what_to_install(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "zmq.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'zmq'\", name='zmq')\n"
    )
    args = ("daemon", "--socket", str(tmp_path / "s"), "--set", "daemon.zmq=tcp://127.0.0.1:5557")
    path = ":".join([str(hidden), *filter(None, sys.path)])
    done = kvstore(tmp_path, *args, "--ram-bytes", "1 MiB", PYTHONPATH=path)
    assert done.status == 2
    assert (
        "daemon.zmq needs zmq, which is not installed: pip install -e '.[events]' in its clone"
        in done.stderr
    )
    assert "Traceback" not in done.stderr

"""A snapshot and the events after it are what the store holds: always, and after a restart."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.errors import ClosedError, FallenBehindError
from kvstore.events import Cleared, Contents, Removed, Snapshot, Stored, apply
from kvstore.feed import Feed, Table
from kvstore.hashing import Chain, Key
from kvstore.retention import Retention
from kvstore.store import BlockStore
from kvstore.tiers.nvme import NvmeTier
from tests.store.rig import NAMESPACE, PATIENCE_S, Rig, chain, get, put
from tests.tiers.subjects import extent, flip_in_file

MakeRig = Callable[..., Rig]

OTHER = replace(NAMESPACE, model="other")
PROMPTS = 60
LONGEST = 24
UNIVERSE = [chain(LONGEST, seed, (NAMESPACE, OTHER)[seed % 2]) for seed in range(PROMPTS)]


class Follower:
    """What one knows who has taken a snapshot and reads on from there."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self.last_id, self.contents = feed.snapshot()

    def catch_up(self, until: int) -> None:
        """Apply events up to number `until`, checking that none is missing, void or twice."""
        while self.last_id < until:
            for number, event in self._feed.read(self.last_id, 100):
                if number > until:
                    return
                assert number == self.last_id + 1
                self.last_id = number
                if not isinstance(event, Cleared):
                    held = self.contents.get((event.tier, event.namespace), {})
                    here = [key in held for key in event.keys]
                    assert here
                    assert here == [isinstance(event, Removed)] * len(here)
                apply(self.contents, event)


def truth(rig: Rig) -> Snapshot:
    """What the tables hold and the last event, looked at with everything standing still."""
    tiers: list[Table] = [rig.ram] if rig.gate is None else [rig.ram, rig.nvme]
    contents: Contents = {}
    with ExitStack() as locks:
        for tier in tiers:
            locks.enter_context(tier.lock)
        for tier in tiers:
            index = tier.slots.index
            for key, row in index.rows_by_key.items():
                held = contents.setdefault((tier.name, tier.slots.namespace(row)), {})
                held[key] = index.parents[row]
        return Snapshot(rig.store.feed.last_id, contents)


def agree(rig: Rig, follower: Follower) -> None:
    now = truth(rig)
    follower.catch_up(now.last_id)
    assert follower.contents == now.contents


def agree_with_probe(rig: Rig, follower: Follower) -> None:
    """The same by the store's own answers. Nothing may be moving."""
    agree(rig, follower)
    held = follower.contents
    for blocks in UNIVERSE:
        ram, nvme = (held.get((t, blocks.namespace.fingerprint), {}) for t in ("ram", "nvme"))
        tiers = ["ram" if key in ram else "nvme" if key in nvme else None for key in blocks]
        assert rig.store.probe(blocks).tiers == tiers
        assert rig.nvme.peek(blocks.keys) == [key in nvme for key in blocks]


class Writer:
    """Random operations, the same for one seed."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self._rig = rig
        self._random = random.Random(seed)

    def step(self) -> None:
        rig, store, dice = self._rig, self._rig.store, self._random
        blocks = dice.choice(UNIVERSE)
        start = dice.randrange(LONGEST // 2) if dice.random() < 0.2 else 0
        blocks = blocks.slice(start, dice.randrange(start + 1, LONGEST + 1))
        what = dice.random()
        if what < 0.45:
            self._put(store, blocks)
        elif what < 0.75:
            with store.acquire(blocks) as lease:
                lease.wait()
        elif what < 0.85:
            store.prefetch(blocks)
        elif what < 0.92:
            store.evict(blocks)
        elif what < 0.94:
            store.retain(blocks, Retention(dice.randrange(101), ttl_s=1.0))
        elif what < 0.96:
            rig.clock.now_s += dice.random()
        else:
            store.flush()  # or NVMe is never asked for room: what waits for it stays in RAM

    def _put(self, store: BlockStore, blocks: Chain) -> None:
        dice = self._random
        raised = Retention(dice.randrange(101), ttl_s=1.0)  # falls back, or nothing moves any more
        reservation = store.reserve(blocks, retention=raised if dice.random() < 0.2 else None)
        if dice.random() < 0.05:
            reservation.abort()
        else:
            reservation.commit()


def start(make_rig: MakeRig, kept_blocks: int = 1 << 20) -> Rig:
    """RAM for 64 blocks over NVMe for some 200, of the 1,440 that there are."""
    rig = make_rig(nvme_bytes=2 << 20)
    rig.store.feed.start(kept_blocks)
    return rig


def run(rig: Rig, steps: int, looks: int) -> None:
    """Random operations; the followers are compared `looks` times, and as many join."""
    writer, followers = Writer(rig, seed=1), [Follower(rig.store.feed)]
    for number in range(1, steps + 1):
        writer.step()
        if number % (steps // looks) == 0:
            followers.append(Follower(rig.store.feed))
            for follower in followers:
                agree(rig, follower)
    assert rig.store.flush(PATIENCE_S)
    rig.until(rig.is_quiet)
    for follower in followers:
        agree_with_probe(rig, follower)
    stats = rig.store.stats()
    assert stats.ram["evicted_blocks"] > steps // 2
    assert stats.counters["promoted_blocks"] > steps // 10
    assert rig.nvme.slots.evicted_blocks > steps // 10


def test_events_are_what_the_store_holds(make_rig: MakeRig) -> None:
    run(start(make_rig), steps=10_000, looks=10)


@pytest.mark.soak
def test_events_are_what_the_store_holds_long(make_rig: MakeRig) -> None:
    run(start(make_rig, 1 << 23), steps=100_000, looks=100)


def run_among_writers(rig: Rig, steps: int, snapshots: int) -> None:
    """Snapshots while three threads write; each leads to the same end."""
    steps //= 3
    together = threading.Barrier(4)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            writer = Writer(rig, seed)
            together.wait()
            for _ in range(steps):
                writer.step()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    together.wait()
    followers: list[Follower] = []
    while len(followers) < snapshots or any(thread.is_alive() for thread in threads):
        if len(followers) < snapshots:
            followers.append(Follower(rig.store.feed))
        agree(rig, followers[-1])
    for thread in threads:
        thread.join()
    assert failures == []
    assert rig.store.flush(PATIENCE_S)
    rig.until(rig.is_quiet)
    for follower in followers:
        agree_with_probe(rig, follower)


def test_a_snapshot_is_right_while_others_write(make_rig: MakeRig) -> None:
    run_among_writers(start(make_rig), steps=1_500, snapshots=20)


@pytest.mark.soak
def test_a_snapshot_is_right_while_others_write_long(make_rig: MakeRig) -> None:
    run_among_writers(start(make_rig, 1 << 23), steps=50_000, snapshots=200)


def test_a_snapshot_does_not_need_everything_to_stand_still(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.feed.PAGE_ROWS", 8)
    rig = start(make_rig)
    put(rig.store, UNIVERSE[0])
    once = threading.local()
    looks = []
    fingerprints = rig.ram.slots.fingerprints

    def between_two_looks() -> list[bytes]:
        looks.append(len(rig.ram.slots))
        return fingerprints()

    # After each look at RAM's table, with its lock let go, something else is written.
    class Meddling:
        def __enter__(self) -> None:
            lock.acquire()

        def __exit__(self, *error: object) -> None:
            lock.release()
            if getattr(once, "on", False) and len(looks) < 6:
                once.on = False
                put(rig.store, UNIVERSE[len(looks)])
                rig.store.evict(UNIVERSE[len(looks) - 1])
                once.on = True

    lock = rig.ram.lock
    monkeypatch.setattr(rig.ram.slots, "fingerprints", between_two_looks)
    monkeypatch.setattr(rig.ram, "lock", Meddling())
    once.on = True
    follower = Follower(rig.store.feed)
    once.on = False
    monkeypatch.undo()
    assert len(looks) > 6
    assert rig.store.flush(PATIENCE_S)
    agree(rig, follower)


def test_what_survives_a_restart_is_in_the_first_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "nvme"
    first = Rig(path)
    first.store.feed.start()
    put(first.store, UNIVERSE[0])
    put(first.store, UNIVERSE[1])
    follower = Follower(first.store.feed)
    first.finish()
    assert first.store.feed.read(follower.last_id, 10_000)[-1][1] == Cleared()
    follower.catch_up(first.store.feed.last_id)
    assert follower.contents == {}

    second = Rig(path)
    assert second.store.feed.epoch != first.store.feed.epoch
    second.store.feed.start()
    follower = Follower(second.store.feed)
    held = [dict(zip(b.keys, (b.parent, *b.keys), strict=False)) for b in UNIVERSE[:2]]
    places = [("nvme", b.namespace.fingerprint) for b in UNIVERSE[:2]]
    assert follower.contents == dict(zip(places, held, strict=True))
    assert get(second.store, UNIVERSE[0]) == LONGEST
    put(second.store, UNIVERSE[2])
    second.store.evict(UNIVERSE[1])
    assert second.store.flush(PATIENCE_S)
    second.until(second.is_quiet)
    agree_with_probe(second, follower)
    second.finish()


def test_one_commit_is_one_event(ram_rig: Rig) -> None:
    ram_rig.store.feed.start()
    blocks = chain(50)
    put(ram_rig.store, blocks)
    parents = [blocks.parent, *blocks.keys[:-1]]
    stored = Stored("ram", NAMESPACE.fingerprint, list(blocks.keys), parents)
    assert ram_rig.store.feed.read(0, 1000) == [(1, stored)]
    ram_rig.store.evict(blocks)
    ((_, removed),) = ram_rig.store.feed.read(1, 1000)
    assert isinstance(removed, Removed)
    assert sorted(removed.keys) == sorted(blocks.keys)


def test_only_what_was_first_is_told(ram_rig: Rig) -> None:
    store = ram_rig.store
    store.feed.start()
    blocks = chain(6)
    late = store.reserve(blocks)
    put(store, blocks.slice(1, 3))
    late.commit()
    told = [event for _, event in store.feed.read(0, 1000)]
    assert [list(event.keys) for event in told if isinstance(event, Stored)] == [
        [*blocks.keys[1:3]],
        [blocks.keys[0], *blocks.keys[3:]],
    ]


def test_what_is_aborted_was_never_there(ram_rig: Rig) -> None:
    ram_rig.store.feed.start()
    ram_rig.store.reserve(chain(3)).abort()
    assert ram_rig.store.feed.last_id == 0


def test_blocks_of_several_namespaces_that_make_room_are_told_apart(ram_rig: Rig) -> None:
    store = ram_rig.store
    store.feed.start()
    mine, others = chain(20), chain(20, 1, OTHER)
    put(store, mine)
    put(store, others)
    follower = Follower(store.feed)
    put(store, chain(60, 2))
    agree(ram_rig, follower)
    removed = [event for _, event in store.feed.read(2, 1000) if isinstance(event, Removed)]
    assert {event.namespace for event in removed} == {NAMESPACE.fingerprint, OTHER.fingerprint}


def test_a_damaged_block_is_told_to_be_gone(rig: Rig, tmp_path: Path) -> None:
    rig.store.feed.start()
    blocks = chain(4)
    rig.store_below(blocks)
    follower = Follower(rig.store.feed)
    assert isinstance(rig.nvme, NvmeTier)
    offset, _ = extent(rig.nvme, blocks.keys[1])
    flip_in_file(tmp_path / "nvme" / "slab", offset, 9)
    assert get(rig.store, blocks) == 1
    rig.until(rig.is_quiet)
    agree_with_probe(rig, follower)
    assert blocks.keys[1] not in follower.contents["nvme", NAMESPACE.fingerprint]


def test_before_the_start_there_is_nothing_to_read(ram_rig: Rig) -> None:
    feed = ram_rig.store.feed
    put(ram_rig.store, chain(3))
    assert ram_rig.ram.slots.listener is None
    for ask in (lambda: feed.read(0, 1), feed.snapshot, lambda: feed.last_id):
        with pytest.raises(ClosedError, match="start"):
            ask()
    feed.start()
    feed.start(1)  # the first one counts
    assert len(feed.snapshot().contents["ram", NAMESPACE.fingerprint]) == 3
    put(ram_rig.store, chain(8))
    assert len(feed.read(0, 100)) == 1


def test_who_is_slow_must_take_a_snapshot(ram_rig: Rig) -> None:
    feed = ram_rig.store.feed
    feed.start(30)
    follower = Follower(feed)
    for seed in range(20):
        put(ram_rig.store, chain(10, seed))
    with pytest.raises(FallenBehindError, match="take a snapshot"):
        feed.read(follower.last_id, 100)
    agree(ram_rig, Follower(feed))


def test_who_waits_is_woken(ram_rig: Rig) -> None:
    woken: list[Key] = []
    unsubscribe = ram_rig.store.feed.subscribe(lambda: woken.append(b""))
    put(ram_rig.store, chain(1))
    assert woken == []  # not started
    ram_rig.store.feed.start()
    put(ram_rig.store, chain(1, 1))
    assert len(woken) == 1
    unsubscribe()
    unsubscribe()
    put(ram_rig.store, chain(1, 2))
    assert len(woken) == 1

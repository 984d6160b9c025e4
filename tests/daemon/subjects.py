"""The stores that the conformance suite runs, and how to reach behind their backs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from kvstore.hashing import Chain, Key
from kvstore.tiers.nvme import NvmeTier
from kvstore.verbs import Store
from tests.daemon.data_doors import DataDaemon
from tests.daemon.doors import Daemon
from tests.store.rig import BLOCK, PATIENCE_S, Rig, chain, content, get, put
from tests.tiers.subjects import extent, flip_in_file

Open = Callable[[Rig, Path], Iterator[Store]]


def in_process(rig: Rig, folder: Path) -> Iterator[Store]:
    yield rig.store


def over_the_local_door(rig: Rig, folder: Path) -> Iterator[Store]:
    with Daemon(rig.store, folder / "kvstore.sock") as daemon, daemon.connect() as client:
        yield client


def over_the_data_door(rig: Rig, folder: Path) -> Iterator[Store]:
    with DataDaemon(rig.store) as daemon, daemon.connect() as client:
        yield client


SUBJECTS: tuple[Open, ...] = (in_process, over_the_local_door, over_the_data_door)

# For what is only so where blocks stay where they are: there a lease pins them until its release.
NEAR = pytest.mark.parametrize(
    "store", SUBJECTS[:2], indirect=True, ids=lambda subject: subject.__name__
)


def is_near(store: Store) -> bool:
    """Whether its blocks need not be sent to be read."""
    return "remote" not in store.load_costs


def seen(store: Store, tiers: Sequence[str | None]) -> list[str | None]:
    """What the subject calls these tiers: to a client elsewhere all of a daemon is one."""
    if is_near(store):
        return list(tiers)
    return [None if tier is None else "remote" for tier in tiers]


def put_behind(rig: Rig, blocks: Chain) -> None:
    """Behind the subject's back; and nothing of it moves any more."""
    put(rig.store, blocks)
    assert rig.store.flush(PATIENCE_S)


def pinned(rig: Rig) -> int:
    return rig.store.stats().ram["pinned_blocks"]


def damage(rig: Rig, key: Key) -> None:
    """Change one bit of a block on the drive."""
    assert isinstance(rig.nvme, NvmeTier)
    assert rig.path is not None
    flip_in_file(rig.path / "slab", extent(rig.nvme, key)[0], 5)


def stored(rig: Rig, blocks: Chain) -> list[bytes]:
    """The bytes in the arena, found by the RAM tier's own table."""
    index = rig.ram.slots.index
    starts = [index.offset.item(index.rows_by_key[key]) for key in blocks]
    return [bytes(rig.ram.buffer[start : start + BLOCK]) for start in starts]


def right(blocks: Chain) -> list[bytes]:
    return [content(key) for key in blocks]


def others_are_served(daemon: Daemon) -> None:
    """Another client writes and reads as if nothing had happened."""
    with daemon.connect() as client:
        put(client, chain(3, seed=77))
        assert get(client, chain(3, seed=77)) == 3

"""Exports and imports of a store that misbehaves meanwhile."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from kvstore.archive.file import ArchiveWriter, Block, Damage, read
from kvstore.archive.restore import restore
from kvstore.archive.save import Saved, save
from kvstore.client.client import StoreClient
from kvstore.errors import TierError
from kvstore.frame import names
from kvstore.inventory import listing
from kvstore.verbs import Store
from tests.daemon.doors import Daemon
from tests.store.rig import BLOCK, NAMESPACE, Rig, chain, get, put

NAMESPACES = {NAMESPACE.fingerprint: NAMESPACE}


def written(store: Store, rig: Rig, tier: str, file: io.BytesIO) -> Saved:
    rows = listing(rig.store.inventory, tier)
    return save(store, NAMESPACES, rows, ArchiveWriter(file), lambda done, total: None)


def test_what_goes_meanwhile_is_counted(
    rig: Rig, client: StoreClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Evicted after it was listed, or damaged: the others are written all the same."""
    monkeypatch.setattr("kvstore.archive.save.BATCH_BLOCKS", 4)
    blocks = chain(12)
    rig.store_below(blocks)
    rows = listing(rig.store.inventory, "nvme")
    damaged = blocks.keys[6]
    offset = int(rows["offset"][names(rows["key"]).index(damaged)])
    with open(tmp_path / "nvme" / "slab", "r+b") as slab:
        slab.seek(offset)
        slab.write(b"\xff" * 64)
    rig.store.evict(blocks.slice(2, 3))
    file = io.BytesIO()
    writer = ArchiveWriter(file)
    saved = save(client, NAMESPACES, rows, writer, lambda done, total: None)
    assert (saved.blocks, saved.nbytes) == (10, 10 * BLOCK)
    assert saved.missed == {"evicted": 1, "checksum": 1}

    client.evict(blocks)  # after the last release, on the same connection
    nbytes = file.tell()
    file.seek(0)
    restored = restore(client, read(file, nbytes), 0.0, lambda done: None)
    assert (restored.blocks, restored.promised, restored.damage) == (10, 10, [])
    assert get(rig.store, blocks) == 2
    for start in (3, 7):
        stop = 6 if start == 3 else 12
        assert get(rig.store, blocks.slice(start, stop)) == stop - start


def test_a_daemon_that_goes_ends_an_export(
    rig: Rig, daemon: Daemon, client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.archive.save.BATCH_BLOCKS", 4)
    put(rig.store, chain(12))
    rows = listing(rig.store.inventory, "ram")
    seen: list[int] = []

    def report(done: int, total: int) -> None:
        seen.append(done)
        daemon.close()

    with pytest.raises(TierError, match="does not answer any more"):
        save(client, NAMESPACES, rows, ArchiveWriter(io.BytesIO()), report)
    assert seen == [4 * BLOCK]


def test_a_store_with_little_ram_gives_all_the_same(
    rig: Rig, client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches larger than what RAM has left: leases are shorter, and nothing is left out."""
    blocks = chain(60)
    rig.store_below(blocks)
    held = chain(40, seed=1)
    put(rig.store, held)
    with client.acquire(held) as lease:  # of 64 slots
        assert lease.wait() == 40
        file = io.BytesIO()
        saved = written(client, rig, "nvme", file)
    assert saved.missed == {}
    assert saved.blocks >= 60


def test_frames_of_a_namespace_that_is_not_there(rig: Rig) -> None:
    put(rig.store, chain(3))
    file = io.BytesIO()
    written(rig.store, rig, "ram", file)
    data = file.getvalue()
    entries = read(io.BytesIO(data), len(data))
    start = next(entry.start for entry in entries if isinstance(entry, Block))
    cut = data[:24] + data[start:]
    rig.store.evict(chain(3))
    restored = restore(rig.store, read(io.BytesIO(cut), len(cut)), 0.0, lambda done: None)
    assert (restored.blocks, restored.lost) == (0, 3)
    assert [type(each) for each in restored.damage] == [Damage] * 3
    assert "namespace" in restored.damage[0].problem

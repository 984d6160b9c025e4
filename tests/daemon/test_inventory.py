"""What a store holds, listed and checked: in this process, and through a daemon's door."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kvstore import wire
from kvstore.client.client import StoreClient
from kvstore.client.inventory import ClientInventory
from kvstore.compose import connect
from kvstore.daemon.inventory import InventoryVerbs
from kvstore.errors import ConnectionLostError, RequestError, RightsError
from kvstore.frame import names
from kvstore.inventory import Inventory, listing
from kvstore.retention import Retention
from kvstore.tenant import LOCAL
from tests.daemon.doors import Daemon
from tests.store.rig import BLOCK, NAMESPACE, Rig, chain, get, put

OTHER = dataclasses.replace(NAMESPACE, model="other")


@pytest.fixture(params=["store", "client"])
def inventory(request: pytest.FixtureRequest, rig: Rig, client: StoreClient) -> Inventory:
    return rig.store.inventory if request.param == "store" else ClientInventory(client)


def test_every_block_is_listed_with_what_is_known_of_it(rig: Rig, inventory: Inventory) -> None:
    below, above = chain(5), chain(3, seed=1, namespace=OTHER)
    rig.store_below(below, Retention(priority=50))
    put(rig.store, above)
    assert rig.store.flush(30)
    assert inventory.tiers() == ["ram", "nvme"]
    assert inventory.namespaces() == {each.fingerprint: each for each in (NAMESPACE, OTHER)}
    for tier, chains in (("ram", [above]), ("nvme", [below, above])):
        rows = listing(inventory, tier)
        found = dict(zip(names(rows["key"]), rows, strict=True))
        assert found.keys() == {key for blocks in chains for key in blocks}
        assert len(rows) == len(found)
        for blocks in chains:
            for key, parent in zip(blocks, (blocks.parent, *blocks), strict=False):
                row = found[key]
                assert row["parent"].item() == parent
                assert row["namespace"].item() == blocks.namespace.fingerprint
                assert row["raw_bytes"] == row["stored_bytes"] == BLOCK
                assert row["priority"] == (50 if blocks is below else 35)
    used_s = listing(inventory, "ram")["last_use_s"]
    assert (used_s <= rig.clock.wall_s()).all()
    assert (used_s > rig.clock.wall_s() - 600).all()


def test_a_listing_goes_on_page_by_page(
    rig: Rig, inventory: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.store_inventory.PAGE_ROWS", 16)
    blocks = chain(50)
    put(rig.store, blocks)
    assert rig.store.flush(30)
    for tier in ("ram", "nvme"):
        page = inventory.page(tier)
        assert len(page.rows) == page.following == 16
        assert set(names(listing(inventory, tier)["key"])) == set(blocks)
        end = inventory.page(tier, 1 << 40)
        assert (len(end.rows), end.following) == (0, None)
    with pytest.raises(RequestError, match="no tier 'tape'"):
        inventory.page("tape")


def test_blocks_of_any_namespace_can_be_evicted(rig: Rig, inventory: Inventory) -> None:
    ours, theirs = chain(5), chain(3, seed=1, namespace=OTHER)
    rig.store_below(ours)
    put(rig.store, theirs)
    rig.gate.hold("delete")  # on their way out they are listed no more
    assert inventory.evict([*ours.keys[3:], *theirs.keys[1:], bytes(16)]) == 4
    assert names(listing(inventory, "ram")["key"]) == [theirs.keys[0]]
    assert set(names(listing(inventory, "nvme")["key"])) <= {*ours.keys[:3], theirs.keys[0]}
    rig.gate.release()
    assert rig.store.probe(ours).prefix == 3


def test_damaged_blocks_are_found_and_dropped(
    rig: Rig, inventory: Inventory, tmp_path: Path
) -> None:
    blocks = chain(6)
    rig.store_below(blocks)
    before = {row["key"].item(): row["last_use_s"] for row in listing(inventory, "nvme")}
    assert inventory.check([*blocks, bytes(16)]) == (6, 6 * BLOCK, [])
    victim = listing(inventory, "nvme")[2]
    with open(tmp_path / "nvme" / "slab", "r+b") as slab:
        slab.seek(int(victim["offset"]) + BLOCK - 1)
        (byte,) = slab.read(1)
        slab.seek(-1, 1)
        slab.write(bytes([byte ^ 128]))
    damaged = victim["key"].item()
    assert inventory.check(blocks.keys) == (6, 6 * BLOCK, [damaged])
    assert inventory.check(blocks.keys) == (5, 5 * BLOCK, [])
    after = {row["key"].item(): row["last_use_s"] for row in listing(inventory, "nvme")}
    assert after == {key: used_s for key, used_s in before.items() if key != damaged}
    assert get(rig.store, blocks) == blocks.keys.index(damaged)


def test_a_daemon_tells_of_itself(rig: Rig, daemon: Daemon, client: StoreClient) -> None:
    rig.store_below(chain(4))
    put(rig.store, chain(2, seed=1))
    with client.acquire(chain(2, seed=1)) as lease:
        lease.wait()
        status = ClientInventory(client).status()
    (session,) = status["sessions"]
    assert (session["tenant"], session["leases"], session["reservations"]) == ("local", 1, 0)
    assert session["in_flight_bytes"] == 2 * BLOCK
    (namespace,) = status["namespaces"]
    assert namespace["fingerprint"] == NAMESPACE.fingerprint.hex()
    assert namespace["blocks"]["ram"] == 2
    assert namespace["nbytes"]["nvme"] >= 4 * BLOCK
    assert status["uptime_s"] >= 0


def test_it_is_for_administrators(daemon: Daemon) -> None:
    tenant = dataclasses.replace(LOCAL, rights=frozenset({"read", "write"}))
    session = daemon.call(lambda: daemon.service.open(tenant, "somebody"))
    verbs = InventoryVerbs(daemon.service, session)
    for request in (
        wire.ListNamespaces(1),
        wire.ListBlocks(1, "ram", 0),
        wire.EvictBlocks(1, b""),
        wire.CheckBlocks(1, b""),
        wire.GetStatus(1),
    ):
        with pytest.raises(RightsError, match="no right to admin"):
            verbs.answer(request)


def test_a_daemon_that_is_away(daemon: Daemon, client: StoreClient) -> None:
    daemon.close()
    inventory = ClientInventory(client)
    for ask in (inventory.tiers, inventory.status, lambda: inventory.evict([bytes(16)])):
        with pytest.raises(ConnectionLostError):
            ask()


def test_checks_keep_a_pace_and_their_turn(
    rig: Rig, daemon: Daemon, client: StoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer waits; one who does not wait for it is not in the way of the next."""
    blocks = chain(6)
    rig.store_below(blocks)
    monkeypatch.setattr("kvstore.daemon.inventory.CHECKED_BYTES_PER_S", 1)
    with (
        connect(daemon.url, timeout_s=0.2) as impatient,
        pytest.raises(ConnectionLostError, match="no answer within"),
    ):
        ClientInventory(impatient).check(blocks.keys)
    monkeypatch.undo()
    assert ClientInventory(client).check(blocks.keys).blocks == 6

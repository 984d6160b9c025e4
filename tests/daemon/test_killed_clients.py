"""kill -9 of a client, whatever it was doing: what it held is back at once; others go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from kvstore.verbs import Store
from tests.daemon.doors import Daemon
from tests.daemon.subjects import put_behind
from tests.daemon.victim import BLOCKS, STATES, work
from tests.daemon.victims import Clients
from tests.store.rig import BLOCK, PATIENCE_S, Rig, chain, check_bytes, put

KILLS = 20
ROUND_TRIPS = 200  # by then the daemon has long heard that the client is gone
LONGEST_SPIN_S = 0.003


@pytest.fixture(scope="module")
def clients() -> Iterator[Clients]:
    with Clients() as clients:
        yield clients


@pytest.mark.parametrize("seed", [0])
def test_twenty_kills(daemon: Daemon, rig: Rig, clients: Clients, seed: int) -> None:
    campaign(daemon, rig, clients, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 11))
def test_two_hundred_kills(daemon: Daemon, rig: Rig, clients: Clients, seed: int) -> None:
    campaign(daemon, rig, clients, seed)


def test_what_a_device_may_still_write_to_rests(rig: Rig, tmp_path: Path, clients: Clients) -> None:
    """Until its time is over, or the daemon ends: no other block is put there."""
    with Daemon(rig.store, tmp_path / "socket", rest_s=1e6) as daemon:
        put_behind(rig, chain(4, seed=7))
        going = daemon.connect()
        lease, reservation = going.acquire(chain(4, seed=7)), going.reserve(chain(1, seed=8))
        (session,) = daemon.service.sessions
        daemon.call(lambda: daemon.service.end(session, 1e6))
        assert rig.store.stats().ram["pinned_blocks"] == 0
        assert rig.store.stats().ram["used_bytes"] == 5 * BLOCK
        del lease, reservation
        going.close()
        for state in ("half-written", "leased"):
            clients.start(daemon.url, 0, 0, state)
            clients.kill_in(state, 0.0)
            daemon.until(lambda: not daemon.service.sessions)
            assert rig.store.flush(PATIENCE_S)
        ram = rig.store.stats().ram
        assert ram["used_bytes"] == (ram["blocks"] + BLOCKS) * BLOCK
        assert ram["pinned_blocks"] == 0
    settled(rig.store, rig, 0)
    with Daemon(rig.store, tmp_path / "socket", rest_s=0.001) as daemon:
        clients.start(daemon.url, 0, 0, "reserved")
        clients.kill_in("reserved", 0.0)
        with daemon.connect() as bystander:
            daemon.until(lambda: len(daemon.service.sessions) == 1)
            daemon.until(lambda: not daemon.service._resting)
            settled(bystander, rig, 0)


def campaign(daemon: Daemon, rig: Rig, clients: Clients, seed: int) -> None:
    random = Random(seed)
    held = chain(5, seed=500)
    put_behind(rig, held)
    with daemon.connect() as bystander, bystander.acquire(held) as lease:
        for kill in range(KILLS):
            state = STATES[kill % len(STATES)]
            clients.start(daemon.url, random.randrange(1 << 30), random.randrange(10), state)
            for _ in range(10):
                work(bystander, random)
            clients.kill_in(state, LONGEST_SPIN_S * random.random() ** 2)
            settled(bystander, rig, len(held))
            assert len(daemon.service.sessions) == 1
            rig.store.check_invariants()
            assert check_bytes(lease, held) == 5
            with bystander.acquire(chain(8, seed=1_000)) as nothing:
                assert not nothing.views  # what was never committed
    assert put(rig.store, chain(50, seed=501)) == 50


def settled(bystander: Store, rig: Rig, pinned_blocks: int) -> None:
    """Every slot is a block's, and nothing is pinned but what the bystander has leased."""
    for _ in range(ROUND_TRIPS):
        bystander.flush()  # what is being written is pinned as well
        ram = bystander.stats().ram
        if (ram["pinned_blocks"], ram["used_bytes"]) == (pinned_blocks, ram["blocks"] * BLOCK):
            return
    raise AssertionError(f"not given back: {ram}, {rig.store.stats()}")

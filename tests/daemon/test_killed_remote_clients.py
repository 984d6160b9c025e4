"""As test_killed_clients, through the data door: also in the middle of a block, either way."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from tests.daemon.data_doors import DataDaemon
from tests.daemon.subjects import put_behind
from tests.daemon.test_killed_clients import KILLS, LONGEST_SPIN_S, settled
from tests.daemon.victim import STATES, work
from tests.daemon.victims import Clients
from tests.store.rig import Rig, chain, check_bytes, put


@pytest.fixture(scope="module")
def clients() -> Iterator[Clients]:
    with Clients() as clients:
        yield clients


@pytest.mark.parametrize("seed", [0])
def test_twenty_kills(data_daemon: DataDaemon, rig: Rig, clients: Clients, seed: int) -> None:
    campaign(data_daemon, rig, clients, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 11))
def test_two_hundred_kills(data_daemon: DataDaemon, rig: Rig, clients: Clients, seed: int) -> None:
    campaign(data_daemon, rig, clients, seed)


def campaign(daemon: DataDaemon, rig: Rig, clients: Clients, seed: int) -> None:
    random = Random(seed)
    held = chain(5, seed=500)
    put_behind(rig, held)
    with daemon.connect() as bystander, bystander.acquire(held) as lease:
        assert lease.wait() == 5
        for kill in range(KILLS):
            state = STATES[kill % len(STATES)]
            clients.start(daemon.url, random.randrange(1 << 30), random.randrange(10), state)
            for _ in range(10):
                work(bystander, random)
            clients.kill_in(state, LONGEST_SPIN_S * random.random() ** 2)
            daemon.until(lambda: len(daemon.data_door._connections) == 1)
            settled(bystander, rig, 0)
            assert len(daemon.service.sessions) == 1
            rig.store.check_invariants()
            assert check_bytes(lease, held) == 5
            with bystander.acquire(chain(8, seed=1_000)) as nothing:
                assert not nothing.views  # what was never committed
    assert put(rig.store, chain(50, seed=501)) == 50

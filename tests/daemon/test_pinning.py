"""What an engine pins is what blocks come in, its own store's or the daemon's."""

from __future__ import annotations

import torch

from kvstore.client.client import StoreClient
from kvstore.kernels.pinned_memory import PinnedMemory
from kvstore.store import BlockStore
from kvstore.tiers.ram import RamTier
from kvstore.verbs import Store
from tests.store.rig import chain, put

CPU = torch.device("cpu")


def pins_all(store: Store) -> None:
    """One registration, made of `memory`, does for all blocks that come and go."""
    made: list[int] = []

    def register(start: int, nbytes: int, device: torch.device) -> int:
        made.append(nbytes)
        return 0

    pinned = PinnedMemory(register, lambda start, device: 0)
    memory = store.memory()
    assert memory is not None
    assert pinned.pin(memory, CPU)
    put(store, chain(5))
    with store.acquire(chain(5)) as lease, store.reserve(chain(9)) as reservation:
        lease.wait()
        assert len(lease.views) == 5
        assert len(reservation.views) == 4
        assert pinned.holds([*lease.views, *reservation.views], CPU)
    assert made == [len(memory)]


def test_a_store_of_ones_own() -> None:
    with BlockStore(RamTier(8 << 20)) as store:
        pins_all(store)


def test_a_daemon_of_this_machine(client: StoreClient) -> None:
    pins_all(client)


def test_a_daemon_elsewhere(victim: StoreClient) -> None:
    assert victim.memory() is None

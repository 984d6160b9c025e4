"""The data door, for clients that behave: blocks, leases, limits, and a daemon that is away."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kvstore import wire
from kvstore.client.client import StoreClient
from kvstore.compose import connect
from kvstore.daemon.service import Limits
from kvstore.errors import ClosedError, RequestError
from kvstore.hashing import Chain
from kvstore.tier import Miss
from tests.daemon.data_doors import (
    DataDaemon,
    pinned,
    used_bytes,
)
from tests.store.rig import (
    BLOCK,
    NAMESPACE,
    Rig,
    chain,
    check_bytes,
    fill,
    get,
    put,
)


@pytest.fixture
def remote(data_daemon: DataDaemon) -> Iterator[StoreClient]:
    with data_daemon.connect() as client:
        yield client


def test_blocks_go_there_and_back(rig: Rig, remote: StoreClient) -> None:
    blocks = chain(5)
    assert put(remote, blocks) == 5
    assert get(rig.store, blocks) == 5
    assert get(remote, blocks) == 5
    assert remote.probe(chain(7)).tiers == ["remote"] * 5 + [None] * 2


def test_to_an_engine_they_are_remote_and_what_they_cost_is_measured(
    rig: Rig, remote: StoreClient
) -> None:
    put(rig.store, chain(5))
    assert remote.load_costs["remote"].observations == 0
    with remote.acquire(chain(5)) as lease:
        assert lease.wait() == 5
        assert lease.sources == ["remote"] * 5
    assert remote.load_costs["remote"].observations == 1
    assert remote.load_costs["remote"].seconds(1, 5 * BLOCK) is not None
    assert remote.queued_bytes() == {"remote": 0}


def test_blocks_come_as_nvme_brings_them(rig: Rig, remote: StoreClient) -> None:
    rig.store_below(chain(4))
    put(rig.store, chain(2))
    rig.gate.hold("read")
    with remote.acquire(chain(4)) as lease:
        assert lease.wait(2) == 2
        rig.gate.arrived("read")
        assert (lease.ready(), len(lease)) == (2, 4)
        assert remote.queued_bytes() == {"remote": 2 * BLOCK}
        rig.gate.release()
        assert lease.wait() == 4
        assert check_bytes(lease, chain(4)) == 4


def test_what_is_late_is_cut_and_costs_nobody_else(rig: Rig, remote: StoreClient) -> None:
    rig.store_below(chain(4))
    put(rig.store, chain(2))
    rig.gate.hold("read")
    with remote.acquire(chain(4), deadline_s=0.5) as lease:
        assert lease.wait() == 2
        assert (len(lease), lease.miss) == (2, Miss.DEADLINE)
        assert check_bytes(lease, chain(4)) == 2
    rig.gate.release()
    assert get(remote, chain(2)) == 2


def test_a_lease_holds_nothing_of_the_daemon_once_it_is_here(
    rig: Rig, data_daemon: DataDaemon, remote: StoreClient
) -> None:
    put(rig.store, chain(3))
    with remote.acquire(chain(3)) as lease:
        assert lease.wait() == 3
        data_daemon.until(lambda: not pinned(data_daemon))
        assert remote.evict(chain(3)) == 3
        data_daemon.close()
        assert check_bytes(lease, chain(3)) == 3


@pytest.mark.parametrize("limits", [Limits(in_flight_bytes=3 * BLOCK)])
def test_a_client_that_wants_too_much_gets_less(
    rig: Rig, data_daemon: DataDaemon, remote: StoreClient
) -> None:
    put(rig.store, chain(5))
    assert get(remote, chain(5)) == 3
    (session,) = data_daemon.service.sessions
    data_daemon.until(lambda: session.in_flight_bytes == 0)
    with remote.reserve(chain(5, 1)) as first, remote.reserve(chain(5, 2)) as second:
        assert (len(first), len(second)) == (3, 0)


@pytest.mark.parametrize("limits", [Limits(connections=1)])
def test_too_many_clients_are_refused(remote: StoreClient, data_daemon: DataDaemon) -> None:
    put(remote, chain(1))
    with data_daemon.connect() as other:
        assert not other.is_connected
        assert get(other, chain(1)) == 0
    assert get(remote, chain(1)) == 1


def test_threads_share_a_client(rig: Rig, remote: StoreClient) -> None:
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(5):
                mine = chain(4, 10 * seed + step)
                assert put(remote, mine) == 4
                assert get(remote, mine) == 4
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_without_the_daemon_all_is_a_miss_at_once_and_then_it_is_back(rig: Rig) -> None:
    with DataDaemon(rig.store) as daemon:
        client = daemon.connect()
        put(client, chain(3))
        lease = client.acquire(chain(3))
        lease.wait()
    with client:
        assert check_bytes(lease, chain(3)) == 3
        lease.release()
        with client.acquire(chain(3)) as missed:
            assert (len(missed), missed.miss) == (0, Miss.BREAKER)
        with client.reserve(chain(3)) as reservation:
            assert reservation.indices == []
        with DataDaemon(rig.store, endpoint=daemon.endpoint) as again:
            again.until(lambda: client.is_connected)
            assert get(client, chain(3)) == 3


def test_a_daemon_that_says_nothing_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"kvstore://127.0.0.1:{silent.getsockname()[1]}"
        with connect(url, timeout_s=0.05) as client:
            assert not client.is_connected
            assert client.probe(chain(2)).prefix == 0


def test_a_daemon_that_falls_silent_is_given_up(remote_of_mute: tuple[StoreClient, Chain]) -> None:
    client, blocks = remote_of_mute
    with client.acquire(blocks) as lease:
        assert len(lease) == 0
    assert not client.is_connected


@pytest.fixture
def remote_of_mute() -> Iterator[tuple[StoreClient, Chain]]:
    """A client of a daemon that says welcome, and nothing after that."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        accepted: list[socket.socket] = []

        def welcome() -> None:
            sock, _ = listening.accept()
            sock.sendall(wire.encode(wire.Welcome(wire.VERSION, "mute")))
            accepted.append(sock)

        thread = threading.Thread(target=welcome)
        thread.start()
        with connect(f"kvstore://127.0.0.1:{listening.getsockname()[1]}", timeout_s=0.1) as client:
            thread.join()
            yield client, chain(2)
        accepted[0].close()


def test_an_unused_reservation_goes_back(
    rig: Rig, data_daemon: DataDaemon, remote: StoreClient
) -> None:
    with remote.reserve(chain(3)) as reservation:
        fill(reservation.views, chain(3).keys)
    data_daemon.until(lambda: used_bytes(data_daemon) == 0)
    with pytest.raises(RequestError):
        remote.acquire(Chain(NAMESPACE, NAMESPACE.fingerprint, chain(1).keys * 70_000))


def test_memory_is_used_again_but_never_by_two(remote: StoreClient) -> None:
    def address(view: memoryview) -> int:
        return np.frombuffer(view, np.uint8).ctypes.data

    first = remote.reserve(chain(2, 1))
    was = address(first.views[0])
    first.commit()
    for again in (first.commit, first.commit):
        with pytest.raises(ClosedError):
            again()
    first.abort()
    with remote.reserve(chain(2, 2)) as one, remote.reserve(chain(2, 3)) as other:
        assert address(one.views[0]) == was != address(other.views[0])
    with remote.acquire(chain(2, 1)) as lease, remote.acquire(chain(2, 1)) as longer:
        assert lease.wait() == longer.wait() == 2
        assert address(lease.views[0]) != address(longer.views[0])
        lease.release()
        lease.release()
        with remote.acquire(chain(2, 1)) as third, remote.acquire(chain(2, 1)) as fourth:
            assert third.wait() == fourth.wait() == 2
            places = {address(each.views[0]) for each in (longer, third, fourth)}
            assert len(places) == 3

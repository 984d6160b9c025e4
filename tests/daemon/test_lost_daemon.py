"""A daemon that goes away, hangs or comes back: no wrong byte, nothing kept for ever."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from random import Random

import pytest

from kvstore.client.client import StoreClient
from kvstore.errors import ClosedError, RequestError
from kvstore.retention import Retention
from kvstore.tier import Miss
from kvstore.verbs import Store
from kvstore.wire import MAX_KEYS
from tests.daemon.conftest import MakeProcess
from tests.daemon.doors import Daemon, DaemonProcess
from tests.daemon.subjects import pinned, put_behind, right
from tests.daemon.victim import work
from tests.store.rig import BLOCK, PATIENCE_S, Rig, chain, check_bytes, fill, get, put, used

HASTY_S = 1.0


@pytest.fixture
def hasty(daemon: Daemon) -> Iterator[StoreClient]:
    """A client that gives a silent daemon up soon."""
    with daemon.connect(timeout_s=HASTY_S) as client:
        put(client, chain(1, seed=99))
        yield client


def until_reconnected(client: StoreClient) -> None:
    """Bounded by what the client's own thread waits between attempts."""
    for _ in range(600):
        if client.is_connected:
            return
        client._closing.wait(0.1)
    raise AssertionError("the client does not come back")


def all_is_given_back(daemon: Daemon, rig: Rig) -> None:
    daemon.until(lambda: not daemon.service.sessions)
    rig.until(rig.is_quiet)
    rig.store.check_invariants()


# ---- what a lost client holds


def test_a_lease_stays_pinned_while_its_client_is_lost(
    daemon: Daemon, hasty: StoreClient, rig: Rig
) -> None:
    blocks = chain(4)
    put_behind(rig, blocks)
    lease = hasty.acquire(blocks)
    with daemon.wedged():
        assert hasty.probe(blocks).prefix == 0
        with hasty.acquire(blocks) as another:
            assert (len(another), another.miss) == (0, Miss.BREAKER)
    until_reconnected(hasty)
    with daemon.connect() as other:
        for seed in range(10):  # more than RAM holds
            put(other, chain(20, seed + 1))
    assert check_bytes(lease, blocks) == 4
    assert rig.column("pins", blocks) == [1] * 4
    lease.release()
    hasty.close()
    all_is_given_back(daemon, rig)


def test_slots_are_not_given_away_while_a_lost_client_may_write(
    daemon: Daemon, hasty: StoreClient, rig: Rig
) -> None:
    reservation = hasty.reserve(chain(4))
    views = reservation.views
    with daemon.wedged():
        hasty.probe(chain(1))
    until_reconnected(hasty)
    others = chain(59, seed=1)
    put(rig.store, others)
    for view in views:
        view[:] = b"\xee" * BLOCK
    assert get(rig.store, others) == 59
    assert reservation.commit() == 0
    hasty.close()
    all_is_given_back(daemon, rig)
    assert rig.store.probe(chain(4)).prefix == 0


@pytest.mark.parametrize("what", ["lease", "reservation"])
def test_what_is_lost_after_the_daemon_goes_back_with_the_next_verb(
    daemon: Daemon, hasty: StoreClient, rig: Rig, what: str
) -> None:
    put_behind(rig, chain(4))
    held = hasty.acquire(chain(4)) if what == "lease" else hasty.reserve(chain(4, seed=1))
    with daemon.wedged():
        hasty.probe(chain(1))
    until_reconnected(hasty)
    assert len(daemon.service.sessions) == 2
    del held
    gc.collect()
    hasty.probe(chain(1))
    daemon.until(lambda: len(daemon.service.sessions) == 1)
    rig.until(rig.is_quiet)
    assert rig.ram.slots.space.used_bytes == 5 * BLOCK


@pytest.mark.parametrize("how", ["release", "lose"])
def test_what_is_held_when_the_client_closes(daemon: Daemon, rig: Rig, how: str) -> None:
    put_behind(rig, chain(4))
    client = daemon.connect()
    lease, reservation = client.acquire(chain(4)), client.reserve(chain(2, seed=1))
    views = lease.views
    client.close()
    assert len(daemon.service.sessions) == 1
    put(rig.store, chain(60, seed=2))
    assert [bytes(view) for view in views] == right(chain(4))
    if how == "release":
        lease.release()
        fill(reservation.views, chain(2, seed=1).keys)
        assert reservation.commit() == 2
    del client, lease, reservation, views
    gc.collect()
    all_is_given_back(daemon, rig)


def test_an_acquire_that_was_interrupted(daemon: Daemon, client: StoreClient, rig: Rig) -> None:
    put_behind(rig, chain(4))
    client.probe(chain(4))
    link = client._link
    assert link is not None
    interrupting = threading.Thread(target=_interrupt_once_it_waits, args=(link.connection,))
    with daemon.wedged():
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            client.acquire(chain(4))
    interrupting.join()
    client.probe(chain(4))
    client.probe(chain(4))
    assert pinned(rig) == 0
    assert get(client, chain(4)) == 4


def _interrupt_once_it_waits(connection: object) -> None:
    while not connection._replies or not connection._is_read:  # type: ignore[attr-defined]
        threading.Event().wait(0.001)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


# ---- while it is away


def test_everything_is_a_miss_while_it_is_away(daemon: Daemon, rig: Rig) -> None:
    blocks = chain(4)
    put_behind(rig, blocks)
    with daemon.connect() as client:
        lease, reservation = client.acquire(blocks.slice(0, 2)), client.reserve(chain(2, 1))
        daemon.close()
        with client.acquire(blocks) as none:
            assert (len(none), none.ready(), none.wait(), none.miss) == (0, 0, 0, Miss.BREAKER)
            assert (none.views, none.sources) == ([], [])
        assert client.probe(blocks).tiers == [None] * 4
        assert put(client, chain(2, seed=2)) == 0
        assert client.prefetch(blocks) == client.evict(blocks) == 0
        assert client.retain(blocks, Retention(50))[:4] == (0, 0, 0, 4)
        assert client.explain(blocks).reason == "breaker"
        assert not client.flush()
        assert used(client.stats().misses) == {"breaker": 4}
        assert check_bytes(lease, blocks) == 2
        fill(reservation.views, chain(2, 1).keys)
        assert reservation.commit() == 0
        lease.release()


def test_a_lease_that_is_being_filled_ends_when_the_daemon_does(daemon: Daemon, rig: Rig) -> None:
    blocks = chain(4)
    rig.store_below(blocks)
    put(rig.store, blocks.slice(0, 2))
    rig.gate.hold("read")
    with daemon.connect() as client, ThreadPoolExecutor(4) as threads:
        lease = client.acquire(blocks, deadline_s=1e6)
        rig.gate.arrived("read")
        waiting = [threads.submit(lease.wait) for _ in range(4)]
        daemon.close()
        assert [each.result(PATIENCE_S) for each in waiting] == [2] * 4
        assert (len(lease), lease.miss, check_bytes(lease, blocks)) == (2, Miss.BREAKER, 2)
        lease.release()
    rig.gate.release()


def test_a_lease_that_was_cut_stays_cut(daemon: Daemon, client: StoreClient, rig: Rig) -> None:
    """The daemon is late with the news that all is there."""
    blocks = chain(4)
    rig.store_below(blocks)
    rig.gate.hold("read")
    with client.acquire(blocks, deadline_s=0.05) as lease:
        rig.gate.arrived("read")
        with daemon.wedged():
            rig.gate.release()
            rig.until(lambda: not rig.below.promotions.fills)
            assert lease.wait() == 0
            assert (len(lease), lease.miss) == (0, Miss.DEADLINE)
        assert client.probe(blocks).prefix == 4
        assert (len(lease), lease.ready(), lease.views) == (0, 0, [])


def test_a_silent_daemon_is_given_up(process: DaemonProcess) -> None:
    with process.connect(timeout_s=HASTY_S) as client:
        blocks = chain(4)
        put(client, blocks)
        lease = client.acquire(blocks)
        os.kill(process.pid, signal.SIGSTOP)
        with ThreadPoolExecutor(4) as threads:
            asked = [threads.submit(get, client, blocks) for _ in range(4)]
            assert [each.result(PATIENCE_S) for each in asked] == [0] * 4
        assert get(client, blocks) == 0
        assert check_bytes(lease, blocks) == 4
        os.kill(process.pid, signal.SIGCONT)
        until_reconnected(client)
        with process.connect() as other:
            for seed in range(1, 11):  # 1 MiB of RAM, 128 blocks
                put(other, chain(30, seed))
                get(other, chain(30, seed))
            assert check_bytes(lease, blocks) == 4
            lease.release()
            client.close()
            assert other.flush()
            assert other.stats().ram["pinned_blocks"] == 0


def test_a_daemon_that_comes_back_serves_what_is_on_nvme(make_process: MakeProcess) -> None:
    blocks = chain(8)
    with make_process() as first:
        client = first.connect()
        put(client, blocks)
        assert client.flush()
        lease = client.acquire(blocks)
        first.kill()
    assert get(client, blocks) == 0
    make_process()
    until_reconnected(client)
    with client.acquire(blocks) as again:
        assert again.wait() == check_bytes(again, blocks) == 8
        assert again.sources == ["nvme"] * 8
        put(client, chain(100, seed=1))
        assert check_bytes(lease, blocks) == 8
    lease.release()
    client.close()


# ---- one client, many threads and processes


@pytest.mark.parametrize(
    "seed", [*range(5), *(pytest.param(n, marks=pytest.mark.soak) for n in range(5, 55))]
)
def test_closed_while_others_use_it(daemon: Daemon, rig: Rig, seed: int) -> None:
    """What they hold is theirs until they give it back; nothing is left after that."""
    random = Random(seed)
    put_behind(rig, chain(20))
    client, closing = daemon.connect(), random.randint(1, 40)
    asked = threading.Semaphore(0)

    def work() -> None:
        try:
            while True:
                asked.release()
                with client.acquire(chain(20)) as lease, client.reserve(chain(1, 5)) as slots:
                    assert check_bytes(lease, chain(20)) == len(lease)
                    fill(slots.views, chain(1, 5).keys[: len(slots)])
        except ClosedError:
            pass

    with ThreadPoolExecutor(4) as threads:
        working = [threads.submit(work) for _ in range(4)]
        for _ in range(closing):
            asked.acquire()
        client.close()
        for each in working:
            each.result(PATIENCE_S)
    all_is_given_back(daemon, rig)


@pytest.mark.parametrize(
    "seed", [*range(2), *(pytest.param(n, marks=pytest.mark.soak) for n in range(2, 22))]
)
def test_lost_again_and_again_while_others_use_it(daemon: Daemon, rig: Rig, seed: int) -> None:
    """A daemon that hangs now and then, and serves others meanwhile: no wrong byte for anyone."""
    stop = threading.Event()

    def go_on(store: Store, number: int) -> None:
        random = Random(number)
        while not stop.is_set():
            work(store, random)

    with daemon.connect(timeout_s=0.05) as client, ThreadPoolExecutor(5) as threads:
        going = [threads.submit(go_on, client, 10 * seed + number) for number in range(4)]
        going.append(threads.submit(go_on, rig.store, 10 * seed + 4))
        try:
            for _ in range(6):
                with daemon.wedged():
                    while client.is_connected:
                        stop.wait(0.005)
                until_reconnected(client)
        finally:
            stop.set()
        for each in going:
            each.result(PATIENCE_S)
    all_is_given_back(daemon, rig)
    assert rig.ram.slots.space.used_bytes == len(rig.ram.slots) * BLOCK


def test_garbage_may_be_collected_at_any_time(client: StoreClient, rig: Rig) -> None:
    """Also by the thread that is sending or hearing just then: nothing is sent from there."""
    put_behind(rig, chain(4))
    lost: list[object] = [client.acquire(chain(4)), client.reserve(chain(2, seed=1))]
    lost.append(lost)  # only the collector finds it
    link = client._link
    assert link is not None
    with link.connection._sending, link.connection.turn:
        del lost
        gc.collect()
        assert len(link.abandoned) == 2
    client.probe(chain(1))
    client.probe(chain(1))
    assert pinned(rig) == 0
    assert rig.ram.slots.space.used_bytes == 4 * BLOCK


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_leaves_the_client_alone(
    daemon: Daemon, client: StoreClient, rig: Rig
) -> None:
    put_behind(rig, chain(4))
    with client.acquire(chain(4)) as lease:
        pid = os.fork()
        if not pid:
            try:
                client.probe(chain(4))
                os._exit(1)
            except ClosedError:
                client.close()
                os._exit(0)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert check_bytes(lease, chain(4)) == 4
        assert rig.column("pins", chain(4)) == [1] * 4
    assert get(client, chain(4)) == 4


def test_too_long_a_chain_costs_no_connection(daemon: Daemon, client: StoreClient) -> None:
    long = replace(chain(1), keys=chain(1).keys * (MAX_KEYS + 1))
    with pytest.raises(RequestError, match="65536"):
        client.probe(long)
    assert client.probe(replace(long, keys=long.keys[1:])).prefix == 0
    assert client.is_connected

"""A daemon from start to end, in a thread and as a process."""

from __future__ import annotations

from kvstore.client.client import StoreClient
from tests.daemon.doors import Daemon, DaemonProcess
from tests.store.rig import Rig, chain, content, get, put


def test_what_a_client_puts_the_store_has(rig: Rig, client: StoreClient) -> None:
    blocks = chain(5)
    assert put(client, blocks) == 5
    assert get(rig.store, blocks) == 5


def test_what_the_store_has_a_client_gets(rig: Rig, client: StoreClient) -> None:
    blocks = chain(5)
    put(rig.store, blocks)
    with client.acquire(blocks) as lease:
        assert [bytes(view) for view in lease.views] == [content(key) for key in blocks.keys]


def test_the_daemon_ends_with_clients_connected(daemon: Daemon) -> None:
    with daemon.connect() as client:
        put(client, chain(2))
        daemon.close()
        assert get(client, chain(2)) == 0


def test_a_real_daemon(process: DaemonProcess) -> None:
    with process.connect() as one, process.connect() as other:
        assert put(one, chain(5)) == 5
        assert get(other, chain(5)) == 5
    assert process.end() == 0
    assert process.log.count("ready: unix://") == 1

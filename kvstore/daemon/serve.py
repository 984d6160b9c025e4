"""The daemon: a store, its doors, and the way from start to a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from typing import TYPE_CHECKING

from kvstore import compose
from kvstore.daemon.local_door import LocalDoor
from kvstore.daemon.service import Limits, Service
from kvstore.daemon.socket_path import SocketPath, socket_of
from kvstore.errors import SettingsError
from kvstore.settings import Settings
from kvstore.store import BlockStore

if TYPE_CHECKING:
    from kvstore.daemon.zmq_door import ZmqDoor

log = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Run until SIGTERM, SIGINT or SIGHUP, then end in order.

    Raises InputError for what a person can mend: a socket or directory in use, sizes that
    cannot be.
    """
    path = SocketPath(socket_of(settings))
    try:
        store = compose.open(settings)
        try:
            asyncio.run(_run(settings, store, path))
        finally:
            store.close(settings.daemon.shutdown_s)
    finally:
        path.close()


async def _run(settings: Settings, store: BlockStore, path: SocketPath) -> None:
    """Open the doors, wait for a signal, close them."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stopping.set)
    asked = settings.daemon
    service = Service(store, Limits(asked.client_bytes, asked.connections, asked.event_log_blocks))
    async with contextlib.AsyncExitStack() as doors:
        doors.callback(service.close)
        local = LocalDoor(service, path)
        doors.push_async_callback(local.close)
        if asked.zmq is not None:
            doors.push_async_callback(_zmq_door(service, asked.zmq, asked.zmq_replay).close)
        log.info("ready: unix://%s", path.path)
        tell_systemd("READY=1")
        await stopping.wait()
        log.info("ending: what is in RAM goes to NVMe for up to %g s", asked.shutdown_s)
        tell_systemd("STOPPING=1")


def _zmq_door(service: Service, publish: str, replay: str | None) -> ZmqDoor:
    """Raises SettingsError."""
    try:
        from kvstore.daemon.zmq_door import ZmqDoor
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"daemon.zmq needs {error.name}, which is not installed: pip install 'kvstore[events]'"
        ) from None
    return ZmqDoor(service, publish, replay)


def tell_systemd(state: str) -> None:
    """The notification of sd_notify(3), where we were started by systemd; elsewhere nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(state.encode(), address.replace("@", "\0", 1))

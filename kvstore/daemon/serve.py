"""The daemon: a store, its doors, and the way from start to a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore import compose
from kvstore.daemon.data_door import DataDoor
from kvstore.daemon.listening import Endpoint, listen, parse_endpoint
from kvstore.daemon.local_door import LocalDoor
from kvstore.daemon.network import Network
from kvstore.daemon.service import Limits, Service
from kvstore.daemon.socket_path import SocketPath, socket_of
from kvstore.errors import SettingsError
from kvstore.machine import has_gpu
from kvstore.quantities import format_size
from kvstore.settings import Settings
from kvstore.store import BlockStore
from kvstore.version import __version__

if TYPE_CHECKING:
    from kvstore.daemon.zmq_door import ZmqDoor

log = logging.getLogger(__name__)

# More than a device takes to write all that a client may have reserved, which is some GiB
# (`daemon.client_bytes`).
REST_S = 2.0


def serve(settings: Settings, config: Path | None = None) -> None:
    """Run until SIGTERM, SIGINT or SIGHUP, then end in order.

    `config` is the file that the settings were read from, if any: the log names it.
    Raises InputError for what a person can mend: a socket, port or directory in use, sizes that
    cannot be.
    """
    http = _http_endpoint(settings.daemon.http)
    network = Network.of(settings)
    if network.grpc is not None:
        _import_grpc_door()
    path = SocketPath(socket_of(settings))
    try:
        store = compose.open(settings)
        log.info("kvstore %s: %s", __version__, _opened(settings, config, store, network))
        try:
            asyncio.run(_run(settings, store, path, http, network))
        finally:
            store.close(settings.daemon.shutdown_s)
    finally:
        path.close()
    if store.ended is not None:
        written, dropped = store.ended
        if settings.nvme.path is None:
            log.info("ended: %d blocks were dropped", dropped)
        else:
            log.info("ended: %d blocks were still written to NVMe, %d dropped", written, dropped)


async def _run(
    settings: Settings,
    store: BlockStore,
    path: SocketPath,
    http: Endpoint | None,
    network: Network,
) -> None:
    """Open the doors, wait for a signal, close them; the one that tells of it last."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stopping.set)
    asked = settings.daemon
    tenants = network.tenants()
    limits = Limits(asked.client_bytes, asked.connections, asked.event_log_blocks)
    service = Service(store, limits, tenants)
    async with contextlib.AsyncExitStack() as doors:
        if http is not None:
            from kvstore.daemon.http_door import HttpDoor

            doors.push_async_callback((await HttpDoor.open(service, http)).close)
        doors.push_async_callback(asyncio.to_thread, store.close, asked.shutdown_s)
        doors.callback(service.close)
        local = LocalDoor(service, path, rest_s=REST_S if has_gpu() else 0.0)
        doors.push_async_callback(local.close)
        for tenant in tenants:  # now, and not when the first client waits for it
            service.quota_of(tenant)
        if network.data is not None:
            sockets = listen(network.data, "daemon.listen")
            data = DataDoor(service, sockets, tenants, network.tls)
            doors.push_async_callback(data.close)
            log.info("ready: %s", ", ".join(f"kvstore://{each}" for each in data.endpoints))
        if network.grpc is not None:
            from kvstore.daemon.grpc_door import GrpcDoor, credentials_of

            remote = await GrpcDoor.open(service, tenants, network.grpc, credentials_of(asked))
            doors.push_async_callback(remote.close)
            log.info("ready: gRPC on %s", network.grpc._replace(port=remote.port))
        if asked.zmq is not None:
            events = _zmq_door(service, asked.zmq, asked.zmq_replay)
            doors.push_async_callback(events.close)
            replay = f", sent again on {events.replay_address}" if events.replay_address else ""
            log.info("ready: KV events on %s%s", events.address, replay)
        log.info("ready: unix://%s", path.path)
        tell_systemd("READY=1")
        await stopping.wait()
        service.stopping = True
        if settings.nvme.path is None:
            log.info("ending: without NVMe, what is in RAM is dropped")
        else:
            log.info("ending: what is in RAM goes to NVMe for up to %g s", asked.shutdown_s)
        tell_systemd("STOPPING=1")


def _opened(settings: Settings, config: Path | None, store: BlockStore, network: Network) -> str:
    """What is about to be served, and to whom, in one line."""
    nvme, path = store.stats().nvme, settings.nvme.path
    parts = [f"{format_size(settings.ram.capacity_bytes)} of RAM"]
    if path is None:
        parts.append("no NVMe")
    else:
        room = format_size(nvme["capacity_bytes"])
        found = f"{nvme['blocks']} blocks found again"
        parts.append(f"NVMe {path.absolute()} with room for {room}, {found}")
    parts.append("no settings file" if config is None else f"settings of {config.absolute()}")
    parts.append(f"tokens: {len(network.records)}" if network.records else "no tokens")
    parts.append("no TLS" if network.tls is None else "TLS")
    return "; ".join(parts)


def _http_endpoint(text: str | None) -> Endpoint | None:
    """Where the HTTP door is to listen, if anywhere: all that can be refused, before we begin."""
    if text is None:
        return None
    endpoint = parse_endpoint(text, "daemon.http")
    try:
        from kvstore.daemon.http_door import check_loopback
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"daemon.http needs {error.name}, which is not installed: "
            "pip install -e '.[daemon]' in its clone"
        ) from None
    check_loopback(endpoint)
    return endpoint


def _import_grpc_door() -> None:
    """Raises SettingsError where that cannot be, before a store is opened."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its core would write into our log
    try:
        import kvstore.daemon.grpc_door  # noqa: F401
    except (ImportError, RuntimeError) as error:  # what protoc made refuses an old grpcio
        if isinstance(error, ImportError) and (error.name or "").startswith("kvstore"):
            raise
        raise SettingsError(
            "daemon.grpc needs grpcio, which is not installed, or too old: "
            "pip install -e '.[daemon]' in its clone"
        ) from None


def _zmq_door(service: Service, publish: str, replay: str | None) -> ZmqDoor:
    """Raises SettingsError."""
    try:
        from kvstore.daemon.zmq_door import ZmqDoor
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"daemon.zmq needs {error.name}, which is not installed: "
            "pip install -e '.[events]' in its clone"
        ) from None
    return ZmqDoor(service, publish, replay)


def tell_systemd(state: str) -> None:
    """The notification of sd_notify(3), where we were started by systemd; elsewhere nothing."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(state.encode(), address.replace("@", "\0", 1))

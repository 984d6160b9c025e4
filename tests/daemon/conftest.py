"""Daemons that are taken down again, whatever becomes of the test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from kvstore import wire
from kvstore.client.client import StoreClient
from kvstore.daemon.grpc_door import GrpcDoor
from kvstore.daemon.listening import Endpoint
from kvstore.daemon.service import Limits
from kvstore.daemon.tokens import Tenants
from kvstore.verbs import Store
from tests.daemon.data_doors import LARGE, LARGE_BYTES, DataDaemon, RawClient
from tests.daemon.doors import Daemon, DaemonProcess
from tests.daemon.grpc_client import GrpcClient
from tests.daemon.subjects import SUBJECTS
from tests.daemon.tenants import TENANTS, THIEF, VICTIM
from tests.store.rig import BLOCK, Rig, RunningClock, chain, put

MakeProcess = Callable[..., DaemonProcess]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """The store behind `daemon`: 64 blocks of RAM over plenty of NVMe; checked at the end."""
    rig = Rig(tmp_path / "nvme", clock=RunningClock())
    yield rig
    rig.finish()


@pytest.fixture
def limits() -> Limits | None:
    """Of the clients of `daemon`; parametrize it for others."""
    return None


@pytest.fixture
def daemon(rig: Rig, tmp_path: Path, limits: Limits | None) -> Iterator[Daemon]:
    """A daemon over `rig`'s store in a thread of this process."""
    with Daemon(rig.store, tmp_path / "kvstore.sock", limits) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[StoreClient]:
    with daemon.connect() as client:
        yield client


@pytest.fixture
def tenants_daemon(rig: Rig) -> Iterator[DataDaemon]:
    with DataDaemon(rig.store, TENANTS) as daemon:
        yield daemon


@pytest.fixture
def victim(tenants_daemon: DataDaemon) -> Iterator[StoreClient]:
    with tenants_daemon.connect(token=VICTIM) as client:
        yield client


@pytest.fixture
def thief(tenants_daemon: DataDaemon) -> Iterator[StoreClient]:
    with tenants_daemon.connect(token=THIEF) as client:
        yield client


@pytest.fixture
def data_daemon(rig: Rig, limits: Limits | None) -> Iterator[DataDaemon]:
    with DataDaemon(rig.store, limits=limits) as daemon:
        yield daemon


@pytest.fixture
def raw(data_daemon: DataDaemon) -> Iterator[RawClient]:
    with RawClient(data_daemon) as raw:
        assert isinstance(raw.hear(), wire.Welcome)
        yield raw


@pytest.fixture
def large_daemon() -> Iterator[DataDaemon]:
    """24 large blocks of one chain in its RAM, and room for as many."""
    rig = Rig(None, ram_blocks=48 * LARGE_BYTES // BLOCK, clock=RunningClock())
    put(rig.store, chain(24, namespace=LARGE))
    with DataDaemon(rig.store) as daemon:
        yield daemon
    rig.finish()


@pytest.fixture
def make_process(tmp_path: Path) -> Iterator[MakeProcess]:
    """Starts `kvstore daemon` with these flags over `tmp_path/nvme`, once or again and again."""
    with ExitStack() as processes:

        def make(*args: str) -> DaemonProcess:
            nvme = ("--nvme-path", str(tmp_path / "nvme"), "--nvme-bytes", "8 MiB")
            every = ("--ram-bytes", "1 MiB", *nvme, *args)
            return processes.enter_context(DaemonProcess(tmp_path, *every))

        yield make


@pytest.fixture
def process(make_process: MakeProcess) -> DaemonProcess:
    """A real daemon: 1 MiB of RAM over 8 MiB of NVMe."""
    return make_process()


@pytest.fixture(scope="session")
def _grpc_runtime() -> None:
    """What grpc starts once and keeps: a thread that polls for asyncio, a few descriptors."""

    async def start_and_stop() -> None:
        grpc.aio.init_grpc_aio()  # in a loop: there may be none outside
        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            await asyncio.to_thread(grpc.channel_ready_future(channel).result)
        await server.stop(None)

    asyncio.run(start_and_stop())


@pytest.fixture
def tenants() -> Tenants:
    """Of the gRPC door; parametrize it, or define another, for ones with tokens."""
    return Tenants()


@pytest.fixture
def address(_grpc_runtime: None, daemon: Daemon, tenants: Tenants) -> Iterator[str]:
    """Where `daemon` serves gRPC."""
    where = Endpoint("127.0.0.1", 0)
    door = daemon.run(GrpcDoor.open(daemon.service, tenants, where))
    yield f"127.0.0.1:{door.port}"
    daemon.run(door.close())


@pytest.fixture
def remote(address: str) -> Iterator[GrpcClient]:
    """A gRPC client of `daemon`, without a token."""
    with GrpcClient(address) as client:
        yield client


@pytest.fixture(params=SUBJECTS, ids=lambda subject: subject.__name__)
def store(request: pytest.FixtureRequest, rig: Rig, tmp_path: Path) -> Iterator[Store]:
    """The subject; `rig` is what stands behind it."""
    yield from request.param(rig, tmp_path)

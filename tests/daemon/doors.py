"""Daemons to test with: their parts in a thread of this process, or a real `kvstore daemon`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from kvstore.client.client import StoreClient
from kvstore.compose import connect
from kvstore.daemon.local_door import LocalDoor
from kvstore.daemon.service import Limits, Service
from kvstore.daemon.socket_path import SocketPath
from kvstore.store import BlockStore
from tests.cli.commands import environment
from tests.store.rig import PATIENCE_S

T = TypeVar("T")


class Daemon:
    """A service and its local door over a store, in a thread with an event loop of its own.

    The store is the test's: to look into, to change behind the clients' backs, to close.
    """

    def __init__(
        self, store: BlockStore, path: Path, limits: Limits | None = None, rest_s: float = 0.0
    ) -> None:
        self.store = store
        self.url = f"unix://{path}"
        self._path = path
        self._limits = limits
        self._rest_s = rest_s
        self._ready: concurrent.futures.Future[Service] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._main, name="test-daemon")
        self._thread.start()
        self.service = self._ready.result(PATIENCE_S)

    def connect(self, **options: Any) -> StoreClient:
        """A client, patient unless told otherwise; it is the caller's to close."""
        return connect(self.url, **{"timeout_s": PATIENCE_S, **options})

    def call(self, work: Callable[[], T]) -> T:
        """What `work` returns in the daemon's loop."""

        async def called() -> T:
            return work()

        return self.run(called())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What the coroutine returns in the daemon's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop run until `condition` holds in it. What it waits for is on its way."""

        async def wait() -> None:
            while not condition():
                await asyncio.sleep(0.001)

        asyncio.run_coroutine_threadsafe(asyncio.wait_for(wait(), PATIENCE_S), self._loop).result()

    @contextmanager
    def wedged(self) -> Iterator[None]:
        """Nothing is answered until the block is left; the kernel still takes what is sent."""
        stuck, free = threading.Event(), threading.Event()

        def stop() -> None:
            stuck.set()
            free.wait(PATIENCE_S)

        self._loop.call_soon_threadsafe(stop)
        assert stuck.wait(PATIENCE_S)
        try:
            yield
        finally:
            free.set()

    def close(self) -> None:
        """End all connections. May be called twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        async with AsyncExitStack() as doors:
            path = SocketPath(self._path)
            doors.callback(path.close)
            service = Service(self.store, self._limits)
            doors.callback(service.close)
            self.door = LocalDoor(service, path, self._rest_s)
            doors.push_async_callback(self.door.close)
            self._ready.set_result(service)
            await self._stopping.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class DaemonProcess:
    """`kvstore daemon` as an operator runs it; ready when the constructor returns.

    In `folder`: the socket, the log, and the NVMe directory. Give another of the same folder
    after this one was killed, and it is the same daemon restarted.
    """

    def __init__(self, folder: Path, *args: str) -> None:
        """Raises RuntimeError with its log where it ends instead of becoming ready."""
        self.path = folder / "kvstore.sock"
        self.url = f"unix://{self.path}"
        self._log = folder / "daemon.log"
        command = [sys.executable, "-m", "kvstore", "daemon", "--socket", str(self.path), *args]
        told = folder / "notify.sock"
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
            open(self._log, "ab") as log,
        ):
            told.unlink(missing_ok=True)
            notified.bind(str(told))
            self.process = subprocess.Popen(
                command, stderr=log, env=environment(folder, NOTIFY_SOCKET=str(told)), cwd=folder
            )
            self._await_ready(notified)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has said on stderr, and those before it in this folder."""
        return self._log.read_text()

    def connect(self, timeout_s: float = PATIENCE_S) -> StoreClient:
        return connect(self.url, timeout_s=timeout_s)

    def kill(self) -> None:
        """`kill -9`; returns when it is dead."""
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """SIGTERM; returns its exit status."""
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    def _await_ready(self, notified: socket.socket) -> None:
        ended = os.pidfd_open(self.pid)
        try:
            readable, _, _ = select.select([notified.fileno(), ended], [], [], PATIENCE_S)
            if notified.fileno() not in readable or notified.recv(100) != b"READY=1":
                self.kill()
                raise RuntimeError(f"the daemon has ended, or hangs: {self.log}")
        finally:
            os.close(ended)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.kill()

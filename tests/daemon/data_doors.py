"""A daemon with a data door, in a thread of this process, and clients that say what they like."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import ssl
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvstore import wire
from kvstore.client.client import StoreClient
from kvstore.compose import connect
from kvstore.daemon.data_door import DataDoor
from kvstore.daemon.listening import Endpoint, listen
from kvstore.daemon.service import Limits, Service
from kvstore.daemon.tokens import Tenants
from kvstore.hashing import Chain
from kvstore.store import BlockStore
from tests.daemon.doors import Daemon
from tests.store.rig import NAMESPACE, PATIENCE_S

# 24 of them are more than the kernel takes for a client that does not read.
LARGE = dataclasses.replace(NAMESPACE, layers=128)
LARGE_BYTES = LARGE.layout.block_bytes  # 1 MiB


class DataDaemon(Daemon):
    """A service and its data door over a store."""

    def __init__(
        self,
        store: BlockStore,
        tenants: Tenants | None = None,
        limits: Limits | None = None,
        tls: ssl.SSLContext | None = None,
        endpoint: Endpoint = Endpoint("127.0.0.1", 0),  # noqa: B008  a tuple
    ) -> None:
        self._tenants = tenants or Tenants()
        self._tls = tls
        self.endpoint = endpoint
        super().__init__(store, Path("unused"), limits)
        self.url = f"kvstore://{self.endpoint}"

    def connect(self, **options: Any) -> StoreClient:
        """A client; it is the caller's to close."""
        return connect(self.url, **options)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        async with AsyncExitStack() as doors:
            service = Service(self.store, self._limits, self._tenants)
            doors.callback(service.close)
            sockets = listen(self.endpoint, "test")
            self.data_door = DataDoor(service, sockets, self._tenants, self._tls)
            doors.push_async_callback(self.data_door.close)
            self.endpoint = self.data_door.endpoints[0]
            self._ready.set_result(service)
            await self._stopping.wait()


class RawClient:
    """Says on the data door whatever it is told to, and hears what is answered."""

    def __init__(
        self, daemon: DataDaemon, token: str = "", receive_bytes: int | None = None
    ) -> None:
        """`receive_bytes`: what the kernel takes in for us, when that is to be little."""
        self.socket = socket.socket()
        self.socket.settimeout(PATIENCE_S)
        if receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.connect(daemon.endpoint)
        self.say(wire.Hello(wire.VERSION, "raw", token))
        self._seq = 0

    def say(self, message: Any, payload: bytes = b"") -> None:
        self.socket.sendall(wire.encode(message) + payload)

    def hear(self) -> wire.Reply:
        """The next message. Raises ConnectionResetError at the end."""
        prefix = self.take(wire.LENGTH_BYTES)
        return wire.decode_reply(self.take(wire.body_bytes(prefix)))

    def take(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            piece = self.socket.recv(nbytes - len(data))
            if not piece:
                raise ConnectionResetError
            data += piece
        return data

    def ask(self, kind: Any, *fields: Any) -> Any:
        """The reply; what else comes meanwhile is passed over, bytes and all."""
        self._seq += 1
        self.say(kind(self._seq, *fields))
        while True:
            reply = self.hear()
            if isinstance(reply, wire.Payload):
                self.take(reply.payload_bytes)
            elif getattr(reply, "seq", 0) in (0, self._seq) and not isinstance(
                reply, wire.Progress
            ):
                return reply

    def open(self, chain: Chain) -> int:
        opened = self.ask(wire.OpenNamespace, chain.namespace.to_json())
        assert isinstance(opened, wire.NamespaceOpened)
        return opened.namespace

    def about(self, kind: Any, chain: Chain, *fields: Any) -> Any:
        """The reply to a request about a chain."""
        keys = wire.pack_keys(chain.keys)
        return self.ask(kind, self.open(chain), chain.parent, keys, *fields)

    def ended(self) -> bool:
        """Whether the daemon has ended the connection; takes in all that comes before."""
        return ended(self.socket)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def ended(sock: socket.socket) -> bool:
    """Whether the other side has ended the connection; takes in all that comes before."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def pinned(daemon: DataDaemon) -> int:
    return daemon.store.stats().ram["pinned_blocks"]


def used_bytes(daemon: DataDaemon) -> int:
    return daemon.store.stats().ram["used_bytes"]

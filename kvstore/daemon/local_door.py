"""The door for engines of this machine: a Unix socket for words, shared memory for bytes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct

from kvstore import wire
from kvstore.daemon.connection import Connection
from kvstore.daemon.conversation import Conversation, failed
from kvstore.daemon.hello import HELLO_S, understood
from kvstore.daemon.service import Service
from kvstore.daemon.session import Session
from kvstore.daemon.socket_path import SocketPath
from kvstore.errors import KVStoreError, RightsError
from kvstore.tenant import LOCAL
from kvstore.version import __version__

log = logging.getLogger(__name__)

PAUSE_S = 0.1  # where no more connections can be had
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred


class LocalDoor:
    """Accepts processes of this user (and root's), and hands each the arena."""

    def __init__(self, service: Service, path: SocketPath, rest_s: float = 0.0) -> None:
        """The first two are borrowed. `rest_s` is how long slots rest that a client had reserved
        when it went without a word: its device may be writing to them still.
        """
        self._service = service
        self._path = path
        self._rest_s = rest_s
        self._greetings: set[asyncio.Task[None]] = set()
        self._connections: set[Connection] = set()
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._listen()

    async def close(self) -> None:
        """End every connection. Clients keep the memory that they have mapped."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._path.socket)
        self._path.stop_listening()
        for task in self._greetings:
            task.cancel()
        await asyncio.gather(*self._greetings, return_exceptions=True)
        for connection in list(self._connections):
            connection.close()
        await asyncio.gather(*(connection.closed for connection in list(self._connections)))

    def _listen(self) -> None:
        self._pause = None
        self._loop.add_reader(self._path.socket, self._accept)

    def _accept(self) -> None:
        """Let in who stands before the door."""
        try:
            client, _ = self._path.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):  # he has gone again
            return
        except OSError as error:  # no descriptors left: others may give theirs back
            log.warning("no connection can be accepted: %s", error)
            self._loop.remove_reader(self._path.socket)
            self._pause = self._loop.call_later(PAUSE_S, self._listen)
            return
        task = self._loop.create_task(self._greet(client))
        self._greetings.add(task)
        task.add_done_callback(self._greetings.discard)
        # Here, for a task that is cancelled before it begins does nothing at all.
        task.add_done_callback(lambda task: client.close() if task.cancelled() else None)

    async def _greet(self, client: socket.socket) -> None:
        """Who is it, and do we understand each other? Then the arena, and a conversation."""
        session: Session | None = None
        client.setblocking(False)
        try:
            pid, uid, _ = _CREDENTIALS.unpack(
                client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            if uid not in (os.geteuid(), 0):
                raise RightsError(f"user {uid} is not the user of this daemon")
            async with asyncio.timeout(HELLO_S):
                await read_hello(client)
            session = self._service.open(LOCAL, f"pid {pid}")
            self._welcome(client)
            await self._converse(client, session)
            session = None  # the connection's now
        except KVStoreError as error:
            log.info("a client was refused: %s", error)
            with contextlib.suppress(OSError):
                client.send(wire.encode(failed(0, error)))
            client.close()
        except (OSError, TimeoutError):
            client.close()
        finally:
            if session is not None:
                self._service.end(session)

    def _welcome(self, client: socket.socket) -> None:
        arena = self._service.store.arena
        welcome = wire.Welcome(wire.VERSION, f"kvstore {__version__}", len(arena.buffer))
        socket.send_fds(client, [wire.encode(welcome)], [arena.fd])

    async def _converse(self, client: socket.socket, session: Session) -> None:
        connection = Connection(
            lambda push: Conversation(self._service, session, push),
            lambda: self._service.end(session, self._rest_s),
        )
        self._connections.add(connection)
        connection.closed.add_done_callback(lambda _: self._connections.discard(connection))
        await self._loop.connect_accepted_socket(lambda: connection, client)


async def read_hello(client: socket.socket) -> wire.Hello:
    """The first message of a non-blocking socket, and no byte more. Raises WireError, OSError."""
    prefix = await _read(client, wire.LENGTH_BYTES)
    return understood(await _read(client, wire.body_bytes(prefix)))


async def _read(client: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        piece = await asyncio.get_running_loop().sock_recv(client, nbytes - len(data))
        if not piece:
            raise ConnectionResetError("the client left before it had said hello")
        data += piece
    return data

"""The door for engines of other machines: words and block bytes over one TCP connection."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Sequence
from functools import partial

from kvstore.daemon.data_connection import DataConnection
from kvstore.daemon.listening import Endpoint
from kvstore.daemon.service import Service
from kvstore.daemon.tokens import Tenants

log = logging.getLogger(__name__)

PAUSE_S = 0.1  # after which a daemon without descriptors looks again who is there


class DataDoor:
    """Accepts whoever has a token, or anyone where none are asked for."""

    def __init__(
        self,
        service: Service,
        sockets: Sequence[socket.socket],
        tenants: Tenants,
        tls: ssl.SSLContext | None,
    ) -> None:
        """Owns the sockets, which listen and do not block; all others are borrowed."""
        self._service = service
        self._sockets = sockets
        self._tenants = tenants
        self._tls = tls
        self._connections: set[DataConnection] = set()
        self._loop = asyncio.get_running_loop()
        self._pauses: dict[socket.socket, asyncio.TimerHandle] = {}
        for each in sockets:
            self._listen(each)

    @property
    def endpoints(self) -> list[Endpoint]:
        """Where it listens."""
        return [Endpoint(*each.getsockname()[:2]) for each in self._sockets]

    async def close(self) -> None:
        """End every connection, and wait until nobody uses the store's memory."""
        for pause in self._pauses.values():
            pause.cancel()
        for each in self._sockets:
            self._loop.remove_reader(each)
            each.close()
        connections = list(self._connections)
        for connection in connections:
            connection.close()
        await asyncio.gather(*(connection.closed for connection in connections))
        for connection in connections:
            connection.join()

    def _listen(self, listening: socket.socket) -> None:
        self._pauses.pop(listening, None)
        self._loop.add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        """Let in who stands before the door."""
        try:
            client, address = listening.accept()
        except (BlockingIOError, ConnectionAbortedError):  # he has gone again
            return
        except OSError as error:  # no descriptors left: others may give theirs back
            log.warning("no connection can be accepted: %s", error)
            self._loop.remove_reader(listening)
            self._pauses[listening] = self._loop.call_later(PAUSE_S, self._listen, listening)
            return
        if len(self._connections) >= self._service.limits.connections:
            log.warning("a client was sent away: there are too many")
            client.close()
            return
        peer = str(Endpoint(*address[:2]))
        connection = DataConnection(self._service, self._tenants, self._tls, client, peer)
        self._connections.add(connection)
        connection.closed.add_done_callback(partial(self._left, connection))

    def _left(self, connection: DataConnection, _closed: object) -> None:
        self._connections.discard(connection)

"""Something that listens where a daemon should, and answers as the test wants."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from kvstore import wire
from kvstore.client.client import StoreClient
from kvstore.compose import connect
from tests.store.rig import PATIENCE_S

Answer = Callable[[wire.Request], bytes]
ARENA_BYTES = 64 << 10


class FakeDaemon:
    """Serves any number of clients, one after the other; the same answer to all."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self.url = f"unix://{path}"
        self.answer = answer
        self.welcome = wire.Welcome(wire.VERSION, "fake", ARENA_BYTES)
        self._arena = os.memfd_create("kvstore-fake")
        os.ftruncate(self._arena, ARENA_BYTES)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(path))
        self._listening.listen()
        self._client: socket.socket | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def connect(self, timeout_s: float = PATIENCE_S) -> StoreClient:
        return connect(self.url, timeout_s=timeout_s)

    def close(self) -> None:
        self._closing = True
        self._listening.shutdown(socket.SHUT_RDWR)
        if self._client is not None:
            with contextlib.suppress(OSError):
                self._client.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()
        os.close(self._arena)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while not self._closing:
                client, _ = self._listening.accept()
                self._client = client
                with client, contextlib.suppress(ConnectionError):
                    self._converse(client)

    def _converse(self, client: socket.socket) -> None:
        with client.makefile("rb") as said:
            while prefix := said.read(wire.LENGTH_BYTES):
                request = wire.decode_request(said.read(wire.body_bytes(prefix)))
                if isinstance(request, wire.Hello):
                    socket.send_fds(client, [wire.encode(self.welcome)], [self._arena])
                elif isinstance(request, wire.OpenNamespace):
                    client.sendall(wire.encode(wire.NamespaceOpened(request.seq, 0)))
                else:
                    client.sendall(self.answer(request))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

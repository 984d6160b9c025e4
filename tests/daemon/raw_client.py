"""A client that says what the test wants, byte by byte."""

from __future__ import annotations

import os
import socket
from types import TracebackType
from typing import Self

from kvstore import wire
from kvstore.hashing import Chain
from tests.daemon.doors import Daemon
from tests.store.rig import NAMESPACE, PATIENCE_S

HELLO = wire.Hello(wire.VERSION, "raw")


class RawClient:
    """One connection to a daemon's local door. It maps no memory."""

    def __init__(self, daemon: Daemon, *, hello: bytes | None = None) -> None:
        """Says hello, or `hello`; `welcome` is the answer."""
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(daemon.url.removeprefix("unix://"))
        self._received = b""
        if hello != b"":
            self.send(wire.encode(HELLO) if hello is None else hello)
            self._received, fds, _, _ = socket.recv_fds(self.socket, 1, 4)
            self.fds = len(fds)
            for fd in fds:
                os.close(fd)
            self.welcome = self.hear()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def say(self, *messages: wire.Request) -> None:
        """All at once."""
        self.send(b"".join(wire.encode(message) for message in messages))

    def hear(self) -> wire.Reply | None:
        """The next message; None where the daemon says no more."""
        prefix = self._exactly(wire.LENGTH_BYTES)
        if prefix is None:
            return None
        body = self._exactly(wire.body_bytes(prefix))
        assert body is not None, "half a frame"
        return wire.decode_reply(body)

    def ask(self, message: wire.Request) -> wire.Reply | None:
        self.say(message)
        return self.hear()

    def open(self) -> None:
        """The tests' namespace, as number 0."""
        assert self.ask(wire.OpenNamespace(1, NAMESPACE.to_json())) == wire.NamespaceOpened(1, 0)

    def acquire(self, blocks: Chain, seq: int = 2) -> wire.Leased:
        leased = self.ask(wire.Acquire(seq, 0, blocks.parent, wire.pack_keys(blocks.keys)))
        assert isinstance(leased, wire.Leased)
        return leased

    def reserve(self, blocks: Chain, seq: int = 3) -> wire.Reserved:
        keys = wire.pack_keys(blocks.keys)
        reserved = self.ask(wire.Reserve(seq, 0, blocks.parent, keys, 35, None))
        assert isinstance(reserved, wire.Reserved)
        return reserved

    def close(self) -> None:
        self.socket.close()

    def _exactly(self, nbytes: int) -> bytes | None:
        while len(self._received) < nbytes:
            try:
                piece = self.socket.recv(65_536)
            except ConnectionResetError:  # it has not even read all that we said
                return None
            if not piece:
                return None
            self._received += piece
        data, self._received = self._received[:nbytes], self._received[nbytes:]
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

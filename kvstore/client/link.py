"""One connection to a daemon, and the memory that came with it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore import wire
from kvstore.client.address import Address
from kvstore.client.connection import Connection, refusal
from kvstore.errors import ConnectionLostError, WireError
from kvstore.hashing import Chain
from kvstore.mapping import map_shared
from kvstore.version import __version__

if TYPE_CHECKING:
    from kvstore.client.lease import ClientLease


class Link:
    """What leases and reservations stand on; of use until the daemon is lost, and no longer.

    Memory stays readable, and leases stay pinned, for as long as someone holds them: the
    socket is closed after the last one, also when the daemon is no longer heard.
    """

    def __init__(self, address: Address, timeout_s: float) -> None:
        """Connects, in `timeout_s` at most.

        Raises ConnectionLostError, RightsError, WireError.
        """
        sock, welcome, fds = _greet(address, timeout_s)
        try:
            if len(fds) != 1 or not welcome.arena_bytes:
                raise WireError("the daemon has sent no memory")
            if os.fstat(fds[0]).st_size < welcome.arena_bytes:
                raise WireError("the daemon's memory is smaller than it says")
            self.arena = map_shared(fds[0], welcome.arena_bytes)
            self.readable = self.arena.toreadonly()
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError):
                raise ConnectionLostError(f"the arena cannot be mapped: {error}") from error
            raise
        finally:
            for fd in fds:
                os.close(fd)
        self.connection = Connection(sock, timeout_s, self._pushed)
        self.leases: dict[int, ClientLease] = {}
        self.abandoned: deque[int] = deque()  # numbers of leases whose owners lost them
        self._namespaces: dict[bytes, int] = {}
        self._retired = False

    @property
    def is_lost(self) -> bool:
        return self.connection.lost is not None

    def ask(
        self,
        kind: type[Any],
        chain: Chain,
        taker: Callable[[wire.Reply], None] | None = None,
        **fields: Any,
    ) -> Any:
        """The reply to a request about a chain. Raises ConnectionLostError and refusals."""
        connection = self.connection
        fingerprint = chain.namespace.fingerprint
        number = self._namespaces.get(fingerprint)
        if number is None:
            seq = connection.next_seq()
            opened = connection.request(seq, wire.OpenNamespace(seq, chain.namespace.to_json()))
            if not isinstance(opened, wire.NamespaceOpened):
                raise WireError("the daemon did not answer what it was asked")
            number = self._namespaces[fingerprint] = opened.namespace
        seq = connection.next_seq()
        keys = wire.pack_keys(chain.keys)
        return connection.request(seq, kind(seq, number, chain.parent, keys, **fields), taker)

    def ask_alone(self, kind: type[Any], **fields: Any) -> Any:
        """The reply to a request about the store as a whole."""
        seq = self.connection.next_seq()
        return self.connection.request(seq, kind(seq, **fields))

    def places(self, offsets: bytes, nbytes: int) -> list[slice]:
        """Where in the arena blocks lie. Raises WireError for what lies outside."""
        starts = wire.unpack_offsets(offsets)
        if len(starts) and int(starts.max()) + nbytes > len(self.arena):
            raise WireError("the daemon names memory outside its arena")
        return list(map(slice, starts.tolist(), (starts + np.uint64(nbytes)).tolist()))

    def let_go(self, number: int) -> None:
        """A lease is over: tell the daemon, and close the socket of a lost one after the last."""
        with self.connection.turn:
            self.leases.pop(number, None)
            is_last = not self.leases
        with contextlib.suppress(ConnectionLostError):
            self.connection.post(wire.Release(number))
        if is_last and self._retired:
            self.connection.close()

    def settle(self) -> None:
        """Give back what lost owners held."""
        while self.abandoned:
            try:
                number = self.abandoned.popleft()
            except IndexError:  # another thread took the last one
                return
            self.let_go(number)

    def retire(self) -> None:
        """Nothing new is asked here; the last lease to go closes the socket."""
        with self.connection.turn:
            self._retired = True
            is_last = not self.leases
        if is_last:
            self.connection.close()

    def _pushed(self, reply: wire.Reply) -> None:
        if isinstance(reply, wire.Progress):
            lease = self.leases.get(reply.lease)
            if lease is not None:
                lease.progress_locked(reply)


def _greet(address: Address, timeout_s: float) -> tuple[socket.socket, wire.Welcome, list[int]]:
    """Say hello, and read the daemon's answer and the descriptors that come with it."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fds: list[int] = []
    try:
        sock.settimeout(timeout_s)
        sock.connect(os.fspath(address.path or ""))
        sock.sendall(wire.encode(wire.Hello(wire.VERSION, f"kvstore {__version__}")))
        prefix, fds, _, _ = socket.recv_fds(sock, wire.LENGTH_BYTES, 1)
        prefix += _exactly(sock, wire.LENGTH_BYTES - len(prefix))
        reply = wire.decode_reply(_exactly(sock, wire.body_bytes(prefix)))
        if isinstance(reply, wire.Failed):
            raise refusal(reply)
        if not isinstance(reply, wire.Welcome) or reply.version != wire.VERSION:
            raise WireError("what listens there is no kvstore daemon of this version")
        return sock, reply, fds
    except BaseException as error:
        sock.close()
        for fd in fds:
            os.close(fd)
        if isinstance(error, OSError):
            raise ConnectionLostError(f"{address} cannot be reached: {error}") from error
        raise


def _exactly(sock: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        piece = sock.recv(nbytes - len(data))
        if not piece:
            raise ConnectionResetError("the daemon has closed the connection")
        data += piece
    return data

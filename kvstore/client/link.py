"""One connection to a daemon, and the memory that came with it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np

from kvstore import wire
from kvstore.client.address import Address
from kvstore.client.connection import Connection, refusal
from kvstore.errors import ConnectionLostError, RequestError, WireError
from kvstore.hashing import Chain
from kvstore.mapping import map_shared
from kvstore.version import __version__

if TYPE_CHECKING:
    from kvstore.client.lease import ClientLease

Ending = wire.Release | wire.Abort


class Link:
    """What leases and reservations stand on; of use until the daemon is lost, and no longer.

    Memory stays readable, and leases stay pinned, for as long as someone holds them: the
    socket is closed after the last one, also when the daemon is no longer heard. So it is
    with reservations, for a slot that was given back becomes another block.
    """

    def __init__(self, address: Address, timeout_s: float) -> None:
        """Connects, in `timeout_s` at most.

        Raises ConnectionLostError, RightsError, RequestError, WireError.
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
        # Of what is held here, by number; guarded by the connection's `turn`.
        self.leases: dict[int, ref[ClientLease]] = {}
        self.reservations: set[int] = set()
        # What lost owners held. The collector finds them, and may run while this very thread
        # has `turn`: it only leaves word here.
        self.abandoned: deque[Ending] = deque()
        # Not a method: the last lease to go takes the link with it, and the socket.
        pushed = partial(_pushed, self.leases, self.abandoned)
        self.connection = Connection(sock, timeout_s, pushed)
        self._namespaces: dict[bytes, int] = {}
        self._retired = False

    @property
    def is_lost(self) -> bool:
        return self.connection.lost is not None

    @property
    def is_held(self) -> bool:
        return bool(self.leases or self.reservations)

    def ask(
        self,
        kind: type[Any],
        chain: Chain,
        taker: Callable[[wire.Reply], None] | None = None,
        **fields: Any,
    ) -> Any:
        """The reply to a request about a chain. Raises ConnectionLostError and refusals."""
        if len(chain) > wire.MAX_KEYS:
            raise RequestError(
                f"a chain of {len(chain)} blocks: a daemon takes {wire.MAX_KEYS} at a time"
            )
        fingerprint = chain.namespace.fingerprint
        number = self._namespaces.get(fingerprint)
        if number is None:
            opened = self.ask_alone(wire.OpenNamespace, record=chain.namespace.to_json())
            number = self._namespaces[fingerprint] = opened.namespace
        seq = self.connection.next_seq()
        keys = wire.pack_keys(chain.keys)
        request = kind(seq, number, chain.parent, keys, **fields)
        return _expected(request, self.connection.request(seq, request, taker))

    def ask_alone(self, kind: type[Any], **fields: Any) -> Any:
        """The reply to a request about the store as a whole."""
        seq = self.connection.next_seq()
        request = kind(seq, **fields)
        return _expected(request, self.connection.request(seq, request))

    def places(self, offsets: bytes, nbytes: int) -> list[slice]:
        """Where in the arena blocks lie. Raises WireError for what lies outside."""
        starts = wire.unpack_offsets(offsets)
        if len(starts) and int(starts.max()) + nbytes > len(self.arena):
            raise WireError("the daemon names memory outside its arena")
        return list(map(slice, starts.tolist(), (starts + np.uint64(nbytes)).tolist()))

    def let_go(self, ending: Ending) -> None:
        """Tell the daemon that something is no longer held."""
        with contextlib.suppress(ConnectionLostError):
            self.connection.post(ending)
        self.forget(ending)

    def forget(self, ending: Ending) -> None:
        """Something is no longer held; the last one closes the socket of a retired link."""
        with self.connection.turn:
            if isinstance(ending, wire.Release):
                self.leases.pop(ending.lease, None)
            else:
                self.reservations.discard(ending.reservation)
        self._close_if_over()

    def settle(self) -> None:
        """Give back what lost owners held."""
        while self.abandoned:
            try:
                ending = self.abandoned.popleft()
            except IndexError:  # another thread took the last one
                return
            self.let_go(ending)

    def retire(self) -> None:
        """Nothing new is asked here; whoever holds something last closes the socket."""
        with self.connection.turn:
            self._retired = True
        self._close_if_over()

    def _close_if_over(self) -> None:
        connection = self.connection
        with connection.turn:
            if not self._retired or self.is_held:
                return
            connection.lose("closed")  # a reply on its way must not become a lease any more
        connection.close()


def _pushed(
    leases: dict[int, ref[ClientLease]], abandoned: deque[Ending], reply: wire.Reply
) -> None:
    """What nobody waits for: news of a lease, or what was meant for one who gave up."""
    match reply:
        case wire.Progress():
            lease = leases[reply.lease]() if reply.lease in leases else None
            if lease is not None:
                lease.progress_locked(reply)
        case wire.Leased():
            abandoned.append(wire.Release(reply.lease))
        case wire.Reserved():
            abandoned.append(wire.Abort(reply.reservation))


_ANSWERS: dict[type, type] = {
    wire.OpenNamespace: wire.NamespaceOpened,
    wire.ProbeChain: wire.Probed,
    wire.Acquire: wire.Leased,
    wire.Reserve: wire.Reserved,
    wire.Prefetch: wire.Counted,
    wire.Retain: wire.Answered,
    wire.Evict: wire.Counted,
    wire.Explain: wire.Answered,
    wire.GetStats: wire.Answered,
    wire.Flush: wire.Counted,
}


def tiers(numbers: bytes) -> list[str | None]:
    """What stands in `Leased.sources` and `Probed.tiers`. Raises WireError."""
    if numbers and max(numbers) >= len(wire.TIERS):
        raise WireError("the daemon names a tier that nobody knows")
    return [wire.TIERS[number] for number in numbers]


def _expected(request: wire.Request, reply: wire.Reply) -> wire.Reply:
    if not isinstance(reply, _ANSWERS.get(type(request), object)):
        raise WireError("the daemon did not answer what it was asked")
    return reply


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

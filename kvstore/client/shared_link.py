"""A daemon of this machine: its memory is ours too, and only words go over the socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from kvstore import wire
from kvstore.answers import NVME, Probe
from kvstore.client.address import Address
from kvstore.client.connection import Connection
from kvstore.client.exchange import check_welcome
from kvstore.client.lease import ClientLease
from kvstore.client.link import Link, tiers
from kvstore.client.reservation import ClientReservation
from kvstore.errors import ConnectionLostError, WireError
from kvstore.mapping import map_shared
from kvstore.planner import LinearCost
from kvstore.version import __version__


class SharedLink(Link):
    """Leases and reservations are the arena itself; nothing is copied.

    Memory stays readable, and leases stay pinned, for as long as someone holds them: the
    socket is closed after the last one, also when the daemon is no longer heard. So it is
    with reservations, for a slot that was given back becomes another block.
    """

    grace_s = 0.25

    def __init__(self, address: Address, timeout_s: float) -> None:
        """Connects, in `timeout_s` at most.

        Raises ConnectionLostError, RightsError, RequestError, WireError.
        """
        super().__init__()
        self.costs = {NVME: LinearCost()}
        self._queued = {NVME: 0}
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
        self.connection = Connection(sock, timeout_s, self._hearing())

    def lease(self, leased: wire.Leased, block_bytes: int, deadline_s: float) -> ClientLease:
        return SharedLease(self, leased, block_bytes, deadline_s)

    def reservation(self, reserved: wire.Reserved, block_bytes: int) -> ClientReservation:
        starts = self.starts(reserved.offsets, block_bytes)
        views = [self.arena[start : start + block_bytes] for start in starts]
        return ClientReservation(self, reserved, views)

    def probed(self, answer: wire.Probed) -> Probe:
        cost = LinearCost.of(answer.latency_s, answer.s_per_byte, answer.observations)
        self.costs = {NVME: cost}
        self._queued = {NVME: answer.queued_bytes}
        return Probe(tiers(answer.tiers))

    def queued_bytes(self) -> Mapping[str, int]:
        """As of the last probe."""
        return self._queued

    def starts(self, offsets: bytes, nbytes: int) -> list[int]:
        """Where in the arena blocks begin. Raises WireError for what lies outside."""
        starts = wire.unpack_offsets(offsets)
        if len(starts) and int(starts.max()) + nbytes > len(self.arena):
            raise WireError("the daemon names memory outside its arena")
        places: list[int] = starts.tolist()
        return places


class SharedLease(ClientLease):
    """Blocks of the daemon's arena, pinned for this process."""

    def __init__(
        self, link: SharedLink, leased: wire.Leased, block_bytes: int, deadline_s: float
    ) -> None:
        """As `Link.lease`."""
        self._starts: list[int] = []  # in the arena, of the blocks that are ready
        self._block_bytes = block_bytes
        self._memory = link
        super().__init__(link, leased, deadline_s)
        self._more_locked(leased.offsets, self._blocks)

    def progress_locked(self, progress: wire.Progress) -> None:
        if not self._is_cut:
            super().progress_locked(progress)
            self._more_locked(progress.offsets, progress.blocks)

    def _views_of(self, start: int, stop: int) -> list[memoryview]:
        memory, nbytes = self._memory.readable, self._block_bytes
        return [memory[place : place + nbytes] for place in self._starts[start:stop]]

    def _more_locked(self, offsets: bytes, blocks: int) -> None:
        """Blocks have become ready, of `blocks` at most."""
        starts = self._starts + self._memory.starts(offsets, self._block_bytes)
        if len(starts) > blocks:
            raise WireError("the daemon has more blocks ready than are leased")
        self._starts = starts
        self._ready = len(starts)


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
        return sock, check_welcome(reply), fds
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

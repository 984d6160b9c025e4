"""A daemon of another machine: words and block bytes over one TCP connection."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from weakref import ref

from kvstore import wire
from kvstore.answers import Probe
from kvstore.client.address import Address
from kvstore.client.buffers import Buffers
from kvstore.client.exchange import check_welcome
from kvstore.client.lease import ClientLease
from kvstore.client.link import Link, tiers
from kvstore.client.reservation import ClientReservation
from kvstore.client.stream_connection import StreamConnection
from kvstore.errors import ConnectionLostError, WireError
from kvstore.planner import LinearCost
from kvstore.stream import FrameReader, PlainStream, Stream, TlsStream
from kvstore.tier import Miss
from kvstore.version import __version__

REMOTE = "remote"


class StreamLinks:
    """Makes links to one daemon; what was learnt of its speed outlives each of them."""

    def __init__(
        self, address: Address, token: str, tls: ssl.SSLContext | None, timeout_s: float
    ) -> None:
        self._address = address
        self._token = token
        self._tls = tls
        self._timeout_s = timeout_s
        self._cost = LinearCost()
        self._buffers = Buffers()

    def __call__(self) -> StreamLink:
        """Connects. Raises ConnectionLostError, RightsError, RequestError, WireError."""
        address = self._address
        try:
            sock = socket.create_connection((address.host, address.port), self._timeout_s)
            stream = self._secured(sock)
        except OSError as error:
            raise ConnectionLostError(f"{address} cannot be reached: {error}") from error
        frames = FrameReader(stream)
        try:
            stream.send([wire.encode(self._hello())])
            check_welcome(wire.decode_reply(frames.frame()))
        except BaseException as error:
            stream.close()
            if isinstance(error, OSError):
                raise ConnectionLostError(
                    f"{address} cannot be reached: {error}{self._hint(error)}"
                ) from error
            raise
        return StreamLink(stream, frames, self._timeout_s, self._cost, self._buffers)

    def _secured(self, sock: socket.socket) -> Stream:
        try:
            if self._tls is None:
                return PlainStream(sock, self._timeout_s)
            secured = self._tls.wrap_socket(sock, server_hostname=self._address.host)
        except BaseException:
            sock.close()
            raise
        return TlsStream(secured, self._timeout_s)

    def _hint(self, error: OSError) -> str:
        """A door that speaks TLS ends the connection of whoever does not, without a word."""
        if self._tls is None and isinstance(error, ConnectionError):
            return " (does it speak TLS? then set client.ca)"
        return ""

    def _hello(self) -> wire.Hello:
        return wire.Hello(wire.VERSION, f"kvstore {__version__}", self._token)


class StreamLink(Link):
    """Leases and reservations are buffers of this process's own.

    A lease costs the daemon nothing once its blocks are here, nor does a lost link.
    """

    connection: StreamConnection

    def __init__(
        self,
        stream: Stream,
        frames: FrameReader,
        timeout_s: float,
        cost: LinearCost,
        buffers: Buffers,
    ) -> None:
        """Owns the stream; `cost` and `buffers` are shared with links before and after."""
        super().__init__()
        self.buffers = buffers
        self.costs = {REMOTE: cost}
        self.arrivals = Arrivals(self.leases, cost)
        self.connection = StreamConnection(
            stream, frames, timeout_s, self._hearing(), self.arrivals
        )

    @property
    def is_held(self) -> bool:
        return False

    def lease(self, leased: wire.Leased, block_bytes: int, deadline_s: float) -> ClientLease:
        return StreamLease(self, leased, block_bytes, deadline_s)

    def reservation(self, reserved: wire.Reserved, block_bytes: int) -> ClientReservation:
        return StreamReservation(self, reserved, block_bytes)

    def probed(self, answer: wire.Probed) -> Probe:
        return Probe([None if tier is None else REMOTE for tier in tiers(answer.tiers)])

    def queued_bytes(self) -> Mapping[str, int]:
        """What is still to come for the leases of this process."""
        return {REMOTE: self.arrivals.expected_bytes}


class Arrivals:
    """Block bytes on their way here. Guarded by the connection's `turn`."""

    def __init__(self, leases: Mapping[int, ref[ClientLease]], cost: LinearCost) -> None:
        self._leases = leases
        self._cost = cost
        self._landing: StreamLease | None = None
        self._idle_since_s = 0.0
        self.expected_bytes = 0

    def begin_locked(self, payload: wire.Payload) -> memoryview | None:
        found = self._leases.get(payload.lease)
        lease = None if found is None else found()
        if not isinstance(lease, StreamLease):
            return None
        self._landing = lease
        return lease.room_locked(payload)

    def end_locked(self, payload: wire.Payload) -> None:
        lease, self._landing = self._landing, None
        if lease is not None:
            lease.arrived_locked(payload.blocks)

    def expect_locked(self, nbytes: int) -> None:
        """So many more bytes are to come, or, below zero, will not."""
        self.expected_bytes += nbytes

    def observe_locked(self, since_s: float, nbytes: int) -> None:
        """A lease is complete: it took from when it began, or from the end of the last one."""
        now_s = time.monotonic()
        self._cost.observe(1, nbytes, now_s - max(since_s, self._idle_since_s))
        self._idle_since_s = now_s


class StreamLease(ClientLease):
    """Blocks that come here one after the other; what has not come by the deadline is cut."""

    def __init__(
        self, link: StreamLink, leased: wire.Leased, block_bytes: int, deadline_s: float
    ) -> None:
        """As `Link.lease`."""
        self._stream = link
        self._block_bytes = block_bytes
        self._since_s = time.monotonic()
        self._expected_bytes = len(leased.sources) * block_bytes
        self._buffer = link.buffers.take(self._expected_bytes) if leased.sources else None
        link.arrivals.expect_locked(self._expected_bytes)
        super().__init__(link, leased, deadline_s)

    @property
    def sources(self) -> list[str]:
        return [REMOTE] * self._blocks

    def room_locked(self, payload: wire.Payload) -> memoryview | None:
        """Where the next blocks go. Raises WireError."""
        stop = self._ready + payload.blocks
        if stop > len(self._sources) or payload.payload_bytes != payload.blocks * self._block_bytes:
            raise WireError("the daemon sends other blocks than it has leased")
        if self._buffer is None:
            return None
        return self._buffer[self._ready * self._block_bytes : stop * self._block_bytes]

    def arrived_locked(self, blocks: int) -> None:
        """They are there; whether anyone still waits for them is another matter."""
        if self._is_cut or self._released:
            return
        self._ready += blocks
        self._expect_less_locked(blocks * self._block_bytes)
        self._end_if_complete_locked()

    def progress_locked(self, progress: wire.Progress) -> None:
        super().progress_locked(progress)
        self._end_if_complete_locked()

    def release(self) -> None:
        super().release()
        with self._link.connection.turn:
            buffer, self._buffer = self._buffer, None
            self._expect_less_locked(self._expected_bytes)
            # An unfinished piece may still be written to one that is not complete.
            if buffer is not None and not self._is_cut:
                self._stream.buffers.give(buffer)

    def _views_of(self, start: int, stop: int) -> list[memoryview]:
        if self._buffer is None:
            return []
        memory, size = self._buffer.toreadonly(), self._block_bytes
        return [memory[i * size : (i + 1) * size] for i in range(start, stop)]

    def _cut_if_over(self) -> None:
        super()._cut_if_over()
        if self._is_cut and self._is_held:
            self._is_held = False
            self._link.let_go(wire.Release(self._number))  # the daemon need not go on

    def _cut_locked(self, miss: Miss) -> None:
        super()._cut_locked(miss)
        self._expect_less_locked(self._expected_bytes)
        if miss is Miss.DEADLINE:  # it would have taken longer; by how much, nobody knows
            self._observe_locked(len(self._sources))

    def _end_if_complete_locked(self) -> None:
        if self._ready < self._blocks or not self._is_held:
            return
        self._is_held = False  # nor does the daemon hold anything for us
        self._link.leases.pop(self._number, None)
        self._expect_less_locked(self._expected_bytes)
        if self._ready:
            self._observe_locked(self._ready)

    def _observe_locked(self, blocks: int) -> None:
        self._stream.arrivals.observe_locked(self._since_s, blocks * self._block_bytes)

    def _expect_less_locked(self, nbytes: int) -> None:
        self._stream.arrivals.expect_locked(-nbytes)
        self._expected_bytes -= nbytes


class StreamReservation(ClientReservation):
    """Buffers of this process's, which `commit` sends."""

    def __init__(self, link: StreamLink, reserved: wire.Reserved, block_bytes: int) -> None:
        """As `Link.reservation`."""
        blocks = len(wire.unpack_indices(reserved.indices))
        self._buffers = link.buffers
        self._buffer = self._buffers.take(blocks * block_bytes) if blocks else None
        views = []
        if self._buffer is not None:
            views = [self._buffer[i * block_bytes : (i + 1) * block_bytes] for i in range(blocks)]
        super().__init__(link, reserved, views)

    def commit(self) -> int:
        try:
            return super().commit()
        finally:
            self._give_back()

    def abort(self) -> None:
        super().abort()
        self._give_back()

    def _payload(self) -> Sequence[memoryview]:
        return self._views

    def _give_back(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._buffers.give(buffer)

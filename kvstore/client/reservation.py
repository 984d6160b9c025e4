"""Slots of the daemon's arena, for this process to fill."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from kvstore import wire
from kvstore.client.link import Link
from kvstore.errors import ClosedError, ConnectionLostError, WireError


class ClientReservation:
    """See `verbs.Reservation`. What is written to `views` is written to the daemon's memory."""

    def __init__(self, link: Link, block_bytes: int, reserved: wire.Reserved) -> None:
        """`turn` of the link's connection is held. Raises WireError."""
        self._open = False  # until all is well
        self._link = link
        self._number = reserved.reservation
        self._views = [link.arena[place] for place in link.places(reserved.offsets, block_bytes)]
        self.indices = wire.unpack_indices(reserved.indices)
        if len(self.indices) != len(self._views):
            raise WireError("the daemon has reserved other slots than it says")
        self._open = True
        link.reservations.add(self._number)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def views(self) -> list[memoryview]:
        """Writable; owned by the daemon's arena. Not to be touched after `commit` or `abort`."""
        if not self._open:
            raise ClosedError("the reservation was committed or aborted before")
        return self._views.copy()

    def commit(self) -> int:
        """As in process; 0 where the daemon is lost, and the blocks with it."""
        if not self._open:
            raise ClosedError("the reservation was committed or aborted before")
        self._open = False
        self._views = []
        connection = self._link.connection
        seq = connection.next_seq()
        try:
            counted = connection.request(seq, wire.Commit(seq, self._number))
        except ConnectionLostError:
            return 0
        finally:
            self._link.forget(wire.Abort(self._number))
        return counted.count if isinstance(counted, wire.Counted) else 0

    def abort(self) -> None:
        if self._open:
            self._open = False
            self._views = []
            self._link.let_go(wire.Abort(self._number))

    def __del__(self) -> None:
        # As with leases: only leave word.
        if self._open:
            self._link.abandoned.append(wire.Abort(self._number))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()


class NoReservation:
    """What a reserve gives while the daemon is away: no slots."""

    @property
    def indices(self) -> list[int]:
        return []

    def __len__(self) -> int:
        return 0

    @property
    def views(self) -> list[memoryview]:
        return []

    def commit(self) -> int:
        return 0

    def abort(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

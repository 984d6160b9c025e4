"""Slots of a daemon, for this process to fill."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from kvstore import wire
from kvstore.client.link import Link
from kvstore.errors import ClosedError, ConnectionLostError, WireError


class ClientReservation:
    """See `verbs.Reservation`. Over shared memory its views are the daemon's slots themselves."""

    _open = False  # until all is well

    def __init__(self, link: Link, reserved: wire.Reserved, views: Sequence[memoryview]) -> None:
        """As `Link.reservation`; the views are borrowed until `commit` or `abort`."""
        self._link = link
        self._number = reserved.reservation
        self._views = list(views)
        self.indices = wire.unpack_indices(reserved.indices)
        if len(self.indices) != len(self._views):
            raise WireError("the daemon has reserved other slots than it says")
        self._open = True
        self._is_held = bool(self._views)  # an empty reservation is nothing to the daemon
        if self._is_held:
            link.reservations.add(self._number)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def views(self) -> list[memoryview]:
        """Writable. Not to be touched after `commit` or `abort`."""
        if not self._open:
            raise ClosedError("the reservation was committed or aborted before")
        return self._views.copy()

    def commit(self) -> int:
        """As in process; 0 where the daemon is lost, and the blocks with it."""
        if not self._open:
            raise ClosedError("the reservation was committed or aborted before")
        self._open = False
        if not self._is_held:
            return 0
        payload = self._payload()
        self._views = []
        connection = self._link.connection
        seq = connection.next_seq()
        nbytes = sum(map(len, payload))
        try:
            counted = connection.request(
                seq, wire.Commit(seq, self._number, nbytes), payload=payload
            )
        except ConnectionLostError:
            return 0
        finally:
            self._link.forget(wire.Abort(self._number))
        return counted.count if isinstance(counted, wire.Counted) else 0

    def abort(self) -> None:
        if self._open:
            self._open = False
            self._views = []
            if self._is_held:
                self._link.let_go(wire.Abort(self._number))

    def _payload(self) -> Sequence[memoryview]:
        """What the daemon has to be sent to have the blocks."""
        return ()

    def __del__(self) -> None:
        # As with leases: only leave word.
        if self._open and self._is_held:
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

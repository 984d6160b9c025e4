"""Slots of the daemon's arena, for this process to fill."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Self

from kvstore import wire
from kvstore.client.link import Link
from kvstore.errors import ClosedError, ConnectionLostError


class ClientReservation:
    """See `verbs.Reservation`. What is written to `views` is written to the daemon's memory."""

    def __init__(self, link: Link, block_bytes: int, reserved: wire.Reserved) -> None:
        self._link = link
        self._number = reserved.reservation
        places = link.places(reserved.offsets, block_bytes)
        self._views = [link.arena[place] for place in places]
        self._open = True
        self.indices = wire.unpack_indices(reserved.indices)

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
        return counted.count if isinstance(counted, wire.Counted) else 0

    def abort(self) -> None:
        if not self._open:
            return
        self._open = False
        self._views = []
        with contextlib.suppress(ConnectionLostError):
            self._link.connection.post(wire.Abort(self._number))

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

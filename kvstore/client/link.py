"""One connection to a daemon, and what is held through it."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

from kvstore import wire
from kvstore.answers import Probe
from kvstore.client.exchange import Exchange
from kvstore.errors import ConnectionLostError, RequestError, WireError
from kvstore.hashing import Chain
from kvstore.planner import LinearCost

if TYPE_CHECKING:
    from kvstore.client.lease import ClientLease
    from kvstore.client.reservation import ClientReservation

Ending = wire.Release | wire.Abort

KEPT_NAMESPACES = 512  # numbers; a daemon remembers the last 1024 that were opened


class Link(ABC):
    """What leases and reservations stand on; of use until the daemon is lost, and no longer.

    `costs` are of reading from the tiers that a probe names.
    """

    grace_s = 0.05  # how much later than its deadline a lease may hear of it from the daemon
    connection: Exchange
    costs: Mapping[str, LinearCost]

    def __init__(self) -> None:
        # Of what is held here, by number; guarded by the connection's `turn`.
        self.leases: dict[int, ref[ClientLease]] = {}
        self.reservations: set[int] = set()
        # What lost owners held. The collector finds them, and may run while this very thread
        # has `turn`: it only leaves word here.
        self.abandoned: deque[Ending] = deque()
        self._namespaces: dict[bytes, int] = {}
        self._retired = False

    @abstractmethod
    def lease(self, leased: wire.Leased, block_bytes: int, deadline_s: float) -> ClientLease:
        """With `turn` held; `deadline_s` by this process's monotonic. Raises WireError."""

    @abstractmethod
    def reservation(self, reserved: wire.Reserved, block_bytes: int) -> ClientReservation:
        """With `turn` held. Raises WireError."""

    @abstractmethod
    def probed(self, answer: wire.Probed) -> Probe:
        """Where blocks are, as far as this process is concerned. Raises WireError."""

    @abstractmethod
    def queued_bytes(self) -> Mapping[str, int]:
        """What each tier has still to bring for those who asked before."""

    @property
    def is_lost(self) -> bool:
        return self.connection.lost is not None

    @property
    def is_held(self) -> bool:
        """Whether anyone would miss the connection, though nothing new is asked."""
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
            number = opened.namespace
            with self.connection.turn:
                if len(self._namespaces) >= KEPT_NAMESPACES:
                    del self._namespaces[next(iter(self._namespaces))]
                self._namespaces[fingerprint] = number
        seq = self.connection.next_seq()
        keys = wire.pack_keys(chain.keys)
        request = kind(seq, number, chain.parent, keys, **fields)
        return _expected(request, self.connection.request(seq, request, taker))

    def ask_alone(self, kind: type[Any], **fields: Any) -> Any:
        """The reply to a request about the store as a whole."""
        seq = self.connection.next_seq()
        request = kind(seq, **fields)
        return _expected(request, self.connection.request(seq, request))

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

    def _hearing(self) -> Callable[[wire.Reply], None]:
        """For the connection. Not a method: the last lease to go takes the link with it."""
        return partial(_pushed, self.leases, self.abandoned)

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
    if numbers and numbers.count(numbers[0]) == len(numbers):
        return [wire.TIERS[numbers[0]]] * len(numbers)
    return [wire.TIERS[number] for number in numbers]


def _expected(request: wire.Request, reply: wire.Reply) -> wire.Reply:
    if not isinstance(reply, _ANSWERS.get(type(request), object)):
        raise WireError("the daemon did not answer what it was asked")
    return reply

"""One client's time with the daemon: what it has opened, and what it must give back."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from kvstore.allocator import align_up
from kvstore.answers import Explanation, Probe, Stats
from kvstore.errors import RequestError, RightsError
from kvstore.hashing import Chain, Key
from kvstore.identity import Namespace
from kvstore.lease import Lease
from kvstore.reservation import Reservation
from kvstore.retention import Retained, Retention
from kvstore.tenant import Right, Tenant
from kvstore.tier import Miss

if TYPE_CHECKING:
    from kvstore.daemon.service import Service

MAX_NAMESPACES = 1024  # of one session; for one more, that opened first is forgotten
MAX_HELD = 16_384  # leases and reservations of one session; beyond, they are empty
MAX_BLOCK_BYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class _Opened:
    """A namespace as the client named it, and as the store knows it."""

    asked: Namespace
    own: Namespace


@dataclass(frozen=True, slots=True)
class Leased:
    """A lease that a client holds."""

    lease: Lease
    asked: Chain
    nbytes: int  # that count against the client

    @property
    def miss(self) -> Miss | None:
        """Why the client gets no more; where it holds too much already, the store does not know."""
        cut = Miss.TOO_SLOW if len(self.lease) < len(self.asked) else None
        return self.lease.miss or cut


@dataclass(frozen=True, slots=True)
class Reserved:
    """A reservation that a client has yet to commit."""

    reservation: Reservation
    nbytes: int  # that count against the client: more than the blocks' where they are small


class Session:
    """The store's verbs for one client. It owns its leases and reservations, and ends with it.

    Belongs to the event loop's thread; nothing here waits. Every verb may raise RightsError,
    and RequestError for what makes no sense.
    """

    def __init__(self, service: Service, tenant: Tenant, peer: str) -> None:
        self.tenant = tenant
        self.peer = peer  # for people: "pid 4711", "10.0.0.7:51234"
        self._service = service
        self._store = service.store
        self._quota = service.quota_of(tenant)
        self._namespaces: dict[int, _Opened] = {}  # by number, that opened first first
        self._opened: dict[bytes, int] = {}  # the same, by the client's fingerprint
        self._namespace_numbers = count()
        self._numbers = count(1)
        self.leases: dict[int, Leased] = {}
        self.reservations: dict[int, Reserved] = {}
        self.in_flight_bytes = 0  # leased and reserved

    # ---- naming

    def open_namespace(self, record: str) -> int:
        """The number by which this client's messages name the namespace from now on.

        Until MAX_NAMESPACES others have been opened; no number is given out twice.
        """
        try:
            asked = Namespace.from_json(record)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"that is no namespace record: {error}") from error
        if asked.layout.block_bytes > MAX_BLOCK_BYTES:
            raise RequestError(f"blocks of more than {MAX_BLOCK_BYTES} bytes are not kept")
        known = self._opened.get(asked.fingerprint)
        if known is not None:
            return known
        if len(self._namespaces) >= MAX_NAMESPACES:
            first = next(iter(self._namespaces))
            del self._opened[self._namespaces.pop(first).asked.fingerprint]
        number = next(self._namespace_numbers)
        self._namespaces[number] = _Opened(asked, self.tenant.namespace(asked))
        self._opened[asked.fingerprint] = number
        return number

    def chain(self, namespace: int, parent: Key, keys: tuple[Key, ...]) -> Chain:
        opened = self._namespaces.get(namespace)
        if opened is None:
            raise RequestError(f"namespace {namespace} was not opened on this connection")
        return self.tenant.chain(opened.asked, opened.own, parent, keys)

    # ---- reading

    def probe(self, chain: Chain) -> Probe:
        self.check_right("read")
        return self._store.probe(chain)

    def explain(self, chain: Chain) -> Explanation:
        self.check_right("read")
        return self._store.explain(chain, known_to=self.tenant.owns)

    def stats(self) -> Stats:
        """The store's, for those who may administer; for all others what is their own."""
        if "admin" in self.tenant.rights:
            return self._store.stats()
        self.check_right("read")
        return self._service.stats_of(self.tenant)

    def acquire(self, chain: Chain, deadline_s: float | None) -> tuple[int, Lease]:
        """A lease and its number. Shorter than the prefix where the client holds too much."""
        self.check_right("read")
        slot_bytes = align_up(chain.namespace.layout.block_bytes)
        lease = self._store.acquire(
            chain.slice(0, self._room_blocks(slot_bytes)), deadline_s=deadline_s
        )
        held = Leased(lease, chain, len(lease) * slot_bytes)
        number = next(self._numbers)
        self.leases[number] = held
        self.in_flight_bytes += held.nbytes
        return number, lease

    def release(self, number: int) -> None:
        """Unknown numbers are ignored: a release may cross the end of its lease."""
        held = self.leases.pop(number, None)
        if held is not None:
            self.in_flight_bytes -= held.nbytes
            held.lease.release()
            self._service.count_served(self.tenant, held)
            if self._quota is not None:
                self._quota.used(held.asked.keys[: len(held.lease)])

    def prefetch(self, chain: Chain) -> int:
        self.check_right("read")
        return self._store.prefetch(chain)

    # ---- writing

    def reserve(self, chain: Chain, retention: Retention) -> tuple[int, Reservation]:
        """A reservation and its number. Shorter where the client holds too much."""
        self.check_right("write")
        if not self._service.admits(self.tenant, chain.namespace):
            chain = chain.slice(0, 0)
        slot_bytes = align_up(chain.namespace.layout.block_bytes)
        chain = chain.slice(0, self._room_blocks(slot_bytes))
        if self._quota is not None:
            chain = chain.slice(0, self._quota.room(chain))
        reservation = self._store.reserve(chain, retention=self.tenant.retention(retention))
        held = Reserved(reservation, len(reservation) * slot_bytes)
        if self._quota is not None:
            self._quota.reserved(reservation)
        number = next(self._numbers)
        self.reservations[number] = held
        self._service.warming.want(reservation.stop())
        self.in_flight_bytes += held.nbytes
        return number, reservation

    def commit(self, number: int) -> int:
        held = self.reservations.pop(number, None)
        if held is None:
            raise RequestError(f"reservation {number} is not open on this connection")
        self.in_flight_bytes -= held.nbytes
        if self._quota is not None:
            self._quota.committed(held.reservation)
        return held.reservation.commit()

    def abort(self, number: int) -> None:
        """Unknown numbers are ignored."""
        held = self.reservations.pop(number, None)
        if held is not None:
            self.in_flight_bytes -= held.nbytes
            held.reservation.abort()
            if self._quota is not None:
                self._quota.aborted(held.reservation)

    def retain(self, chain: Chain, retention: Retention) -> Retained:
        self.check_right("write")
        granted = self.tenant.retention(retention)
        retained = self._store.retain(chain, granted)
        if granted == retention:
            return retained
        return retained._replace(accepted=0, clipped=retained.accepted + retained.clipped)

    def evict(self, chain: Chain) -> int:
        self.check_right("write")
        evicted = self._store.evict(chain)
        if self._quota is not None:
            self._quota.evicted(chain)
        return evicted

    # ---- ending

    def release_all(self) -> None:
        for number in list(self.leases):
            self.release(number)

    def close(self) -> None:
        """Give everything back. May be called twice."""
        self.release_all()
        for number in list(self.reservations):
            self.abort(number)

    # ---- inside

    def check_right(self, right: Right) -> None:
        if right not in self.tenant.rights:
            raise RightsError(f"the tenant {self.tenant.name} has no right to {right}")

    def _room_blocks(self, slot_bytes: int) -> int:
        if len(self.leases) + len(self.reservations) >= MAX_HELD:
            return 0
        room = self._service.limits.in_flight_bytes - self.in_flight_bytes
        return max(0, room // slot_bytes)

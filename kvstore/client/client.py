"""`StoreClient`: a store that lives in a daemon."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

from kvstore import wire
from kvstore.answers import Explanation, Probe, Stats
from kvstore.client.lease import ClientLease, NoLease
from kvstore.client.link import Link
from kvstore.client.reservation import ClientReservation, NoReservation
from kvstore.client.shared_link import SharedLink
from kvstore.errors import ClosedError, ConnectionLostError, KVStoreError, WireError
from kvstore.hashing import Chain
from kvstore.mapping import make_huge
from kvstore.planner import LinearCost
from kvstore.retention import Retained, Retention
from kvstore.tier import Miss
from kvstore.verbs import Lease, Reservation

log = logging.getLogger(__name__)

T = TypeVar("T")

LONGEST_S = 1e9  # that the protocol can say
DEADLINE_S = 5.0  # of an acquire that names none; as the store's own
FIRST_RETRY_S, LAST_RETRY_S = 0.05, 2.0  # between attempts to reach a daemon that is away


class StoreClient:
    """The store's verbs, over one connection that all threads share.

    While the daemon is away nothing waits and nothing fails: every acquire is a miss, every
    reservation empty, and a thread in the background tries to reach it again. A process that
    forks needs a client of its own in the child.
    """

    def __init__(self, name: str, connect: Callable[[], Link]) -> None:
        """Connects at once. `name` is the daemon's, for people.

        An absent daemon is not an error. Raises RightsError or WireError where there is one
        that does not want us, or speaks another version, RequestError where it has no room.
        """
        self._pid = os.getpid()
        self._name = name
        self._connect = connect
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._reconnecting: threading.Thread | None = None
        self._link: Link | None = None
        self._past: list[Link] = []  # lost, of which something is still held
        self._missed_blocks = 0  # asked for while the daemon was away
        self._why_away = ""
        try:
            self._link = connect()
        except ConnectionLostError as error:
            log.warning("%s; going on without it", error)
            self._why_away = str(error)
            self._reconnect_locked()
        except WireError as error:
            raise WireError(f"{name}: {error}") from error

    @property
    def is_connected(self) -> bool:
        """As far as this process has noticed."""
        return self._link is not None

    # ---- asking

    def probe(self, chain: Chain) -> Probe:
        def probe(link: Link) -> Probe:
            answer = link.probed(link.ask(wire.ProbeChain, chain))
            if len(answer.tiers) != len(chain):
                raise WireError("the daemon did not answer what it was asked")
            return answer

        return self._ask(probe) or Probe([None] * len(chain))

    def explain(self, chain: Chain) -> Explanation:
        def explain(link: Link) -> Explanation:
            answer = _value(Explanation, link.ask(wire.Explain, chain))
            pairs = {name: tuple(pair) for name, pair in answer.differences.items()}
            return dataclasses.replace(answer, differences=pairs)

        away = Explanation(len(chain), 0, 0, Miss.BREAKER.value, False)
        return self._ask(explain) or away

    def stats(self) -> Stats:
        """The daemon's; empty while it is away, but for what was missed meanwhile."""
        away = Stats({}, {}, {}, {Miss.BREAKER.value: self._missed_blocks}, {})
        return self._ask(lambda link: _value(Stats, link.ask_alone(wire.GetStats))) or away

    @property
    def load_costs(self) -> Mapping[str, LinearCost]:
        link = self._link
        return {} if link is None else link.costs

    def queued_bytes(self) -> Mapping[str, int]:
        link = self._link
        return {} if link is None else link.queued_bytes()

    def memory(self) -> memoryview | None:
        """The arena of a daemon on this machine, as long as it is the one connected to."""
        link = self._link
        if not isinstance(link, SharedLink):
            return None
        make_huge(link.arena, 0, len(link.arena))
        return link.arena

    # ---- reading

    def acquire(self, chain: Chain, *, deadline_s: float | None = None) -> Lease:
        deadline_s = DEADLINE_S if deadline_s is None else min(max(deadline_s, 0.0), LONGEST_S)
        until_s = time.monotonic() + deadline_s
        leases: list[ClientLease] = []

        def acquire(link: Link) -> Any:
            block_bytes = chain.namespace.layout.block_bytes

            def lease(reply: wire.Reply) -> None:
                if isinstance(reply, wire.Leased):
                    if len(reply.sources) > len(chain):
                        raise WireError("the daemon has leased more than it was asked for")
                    leases.append(link.lease(reply, block_bytes, until_s))

            return link.ask(wire.Acquire, chain, lease, deadline_s=deadline_s)

        self._ask(acquire)
        if not leases:
            with self._lock:
                self._missed_blocks += len(chain)
            return NoLease()
        return leases[0]

    def prefetch(self, chain: Chain) -> int:
        counted = self._ask(lambda link: link.ask(wire.Prefetch, chain))
        return 0 if counted is None else counted.count

    # ---- writing

    def reserve(self, chain: Chain, *, retention: Retention | None = None) -> Reservation:
        asked = retention or Retention()

        taken: list[ClientReservation] = []

        def reserve(link: Link) -> Any:
            block_bytes = chain.namespace.layout.block_bytes

            def take(reply: wire.Reply) -> None:
                if isinstance(reply, wire.Reserved):
                    reservation = link.reservation(reply, block_bytes)
                    positions = [-1, *reservation.indices, len(chain)]
                    if any(b <= a for a, b in pairwise(positions)):
                        raise WireError("the daemon has reserved for other blocks than asked")
                    taken.append(reservation)

            return link.ask(
                wire.Reserve, chain, take, priority=asked.priority, ttl_s=_bounded(asked.ttl_s)
            )

        self._ask(reserve)
        return taken[0] if taken else NoReservation()

    def retain(self, chain: Chain, retention: Retention) -> Retained:
        def retain(link: Link) -> Retained:
            priority, ttl_s = retention.priority, _bounded(retention.ttl_s)
            return _value(Retained, link.ask(wire.Retain, chain, priority=priority, ttl_s=ttl_s))

        absent = Retained(0, 0, 0, len(chain), retention.priority, retention.ttl_s)
        return self._ask(retain) or absent

    def evict(self, chain: Chain) -> int:
        counted = self._ask(lambda link: link.ask(wire.Evict, chain))
        return 0 if counted is None else counted.count

    # ---- ending

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until the daemon has all on NVMe; False on timeout, and while it is away."""
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = wire.FLUSH_S if until_s is None else until_s - time.monotonic()
            counted = self._ask(
                partial(
                    Link.ask_alone, kind=wire.Flush, timeout_s=min(max(0.0, left_s), wire.FLUSH_S)
                )
            )
            if counted is None:
                return False
            if counted.count:
                return True
            if left_s <= wire.FLUSH_S and until_s is not None:
                return False

    def close(self) -> None:
        """End the connection; leases stay readable until released. May be called twice."""
        if os.getpid() != self._pid:  # its locks may be held by threads that only the parent has
            if self._link is not None:
                self._link.connection.close()
            return
        with self._lock:
            self._closing.set()
            link, self._link = self._link, None
            past, self._past = self._past, []
            reconnecting = self._reconnecting
        for each in (*past, *([] if link is None else [link])):
            each.settle()
            each.retire()
        if reconnecting is not None:
            reconnecting.join()

    def __enter__(self) -> StoreClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def check_connected(self) -> None:
        """Raises ConnectionLostError while the daemon is away, for those who cannot go on so."""
        if not self.is_connected:
            raise ConnectionLostError(self._why_away or f"{self._name} cannot be reached")

    def ask(self, kind: type[Any], **fields: Any) -> Any:
        """The reply to a request about the daemon itself.

        Raises ConnectionLostError while it is away, and what it refuses.
        """
        answered = self._ask(lambda link: link.ask_alone(kind, **fields))
        if answered is None:
            self.check_connected()
        return answered

    # ---- inside

    def _ask(self, ask: Callable[[Link], T]) -> T | None:
        """What the daemon answers, or None where it is away. Raises what it refuses."""
        if os.getpid() != self._pid:
            raise ClosedError("the client belongs to the parent process; connect again")
        if self._closing.is_set():
            raise ClosedError("the client is closed; connect again")
        if self._past:
            self._settle_past()
        link = self._link
        if link is None:
            return None
        try:
            link.settle()
            return ask(link)
        except WireError as error:
            link.connection.lose(str(error))
            self._lose(link)
        except ConnectionLostError:
            self._lose(link)
        return None

    def _lose(self, link: Link) -> None:
        """The daemon is away. Leases on the link stay what they are; nothing new is asked there."""
        with self._lock:
            if self._link is link:
                self._why_away = f"{self._name}: {link.connection.lost}"
                log.warning("%s; going on without it", self._why_away)
                self._link = None
                self._past.append(link)
                self._reconnect_locked()
        link.retire()

    def _settle_past(self) -> None:
        """What was leased before the daemon was lost goes back like everything else."""
        for link in self._past.copy():
            link.settle()
        with self._lock:
            self._past = [link for link in self._past if link.is_held]

    def _reconnect_locked(self) -> None:
        if not self._closing.is_set():
            self._reconnecting = threading.Thread(
                target=self._reconnect, name="kvstore-reconnect", daemon=True
            )
            self._reconnecting.start()

    def _reconnect(self) -> None:
        wait_s = FIRST_RETRY_S
        while not self._closing.wait(wait_s):
            wait_s = min(2 * wait_s, LAST_RETRY_S)
            try:
                link = self._connect()
            except KVStoreError as error:
                log.debug("still away: %s", error)
                continue
            with self._lock:
                if not self._closing.is_set():
                    self._link = link
                    log.info("%s: connected again", self._name)
                    return
            link.retire()


def _value(kind: Callable[..., T], answered: wire.Answered) -> T:
    """The answer as what it is here. Raises WireError."""
    try:
        return kind(**answered.fields)
    except TypeError as error:
        raise WireError(f"the daemon answers otherwise than expected: {error}") from error


def _bounded(ttl_s: float | None) -> float | None:
    """As long as can be said; the daemon has a limit of its own, far below."""
    return None if ttl_s is None else min(ttl_s, LONGEST_S)

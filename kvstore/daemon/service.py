"""What all doors of the daemon stand before: one store, and the clients that use it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvstore.answers import Stats
from kvstore.daemon.quota import NamespaceQuota, Quota
from kvstore.daemon.session import Leased, Session
from kvstore.daemon.warming import Warming
from kvstore.errors import RequestError
from kvstore.hot import HotPrefixes, Prefix
from kvstore.identity import Namespace
from kvstore.store import BlockStore
from kvstore.tenant import LOCAL, MARK_CHARACTERS, Tenant
from kvstore.tier import Miss

log = logging.getLogger(__name__)

MiB = 1 << 20
FLUSHES = 2  # at once, over all clients


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may take; beyond, its leases and reservations are shorter."""

    in_flight_bytes: int = 4096 * MiB  # leased and reserved, of one connection
    connections: int = 256  # over all doors; beyond: refused
    event_log_blocks: int = 65_536  # remembered for who follows; further behind: a snapshot


class Service:
    """The store and its sessions. Belongs to the event loop that made it, but for `wake`."""

    def __init__(
        self, store: BlockStore, limits: Limits | None = None, tenants: Iterable[Tenant] = ()
    ) -> None:
        """The store is borrowed. `tenants` are those who have tokens."""
        self.store = store
        self.limits = limits or Limits()
        self.sessions: set[Session] = set()
        self._owners = {tenant.mark: tenant.name for tenant in tenants if tenant.secret}
        self.tenant_blocks: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.quotas: dict[str, Quota] = {}  # of those who have one, and have come
        self._written: defaultdict[str, NamespaceQuota] = defaultdict(NamespaceQuota)
        self.started_s = time.monotonic()
        self.checking = asyncio.Lock()  # whose turn it is to have blocks checked
        self.hot = HotPrefixes()
        self.stopping = False  # the doors are about to close, or the store to end
        self._flushing = asyncio.Semaphore(FLUSHES)
        self.warming = Warming(store.arena)
        self._resting: dict[Session, asyncio.TimerHandle] = {}  # gone, but for reservations
        self._watchers: set[Callable[[], None]] = set()
        self._loop = asyncio.get_running_loop()
        self._awake = False
        self._unsubscribe = store.subscribe(self._wake)

    def open(self, tenant: Tenant, peer: str) -> Session:
        """A new client. Raises RequestError where there are too many."""
        session = Session(self, tenant, peer)
        self.admit(session)
        log.info("%s connected", _who(session), extra={"tenant": tenant.name})
        return session

    def admit(self, session: Session) -> None:
        """As `open`, for one that comes and goes too often to be told of; `dismiss` it."""
        tenant = session.tenant
        if len(self.sessions) >= self.limits.connections:
            raise RequestError(f"{self.limits.connections} clients are connected, and no more may")
        # Those behind a token leave room for others.
        share = max(1, self.limits.connections // 2)
        if (
            tenant.secret
            and sum(each.tenant.name == tenant.name for each in self.sessions) >= share
        ):
            raise RequestError(f"{tenant.name} has {share} clients connected, and no more may")
        self.sessions.add(session)

    def end(self, session: Session, rest_s: float = 0.0) -> None:
        """The client has gone: what it held is free, but `rest_s` later what it had reserved.

        May be called twice.
        """
        if session in self.sessions:
            if rest_s and session.reservations:
                self.sessions.discard(session)
                session.release_all()
                self._resting[session] = self._loop.call_later(rest_s, self._rested, session)
            else:
                self.dismiss(session)
            log.info("%s left", _who(session), extra={"tenant": session.tenant.name})

    def dismiss(self, session: Session) -> None:
        """What it held is free. May be called twice."""
        self.sessions.discard(session)
        session.close()

    async def flush(self, timeout_s: float) -> bool:
        """As of the store, but few at a time: each waits in a thread that others want as well."""
        until_s = self._loop.time() + timeout_s
        try:
            async with asyncio.timeout_at(until_s):
                await self._flushing.acquire()
        except TimeoutError:
            return False
        left_s = max(0.0, until_s - self._loop.time())
        flushing = asyncio.ensure_future(asyncio.to_thread(self.store.flush, left_s))
        # Its thread is taken until it is done, whether or not anyone still waits for it.
        flushing.add_done_callback(lambda _: self._flushing.release())
        return await asyncio.shield(flushing)

    def count_served(self, tenant: Tenant, held: Leased) -> None:
        """asked = ram hits + nvme hits + misses by reason, for each tenant."""
        counted, lease, asked = self.tenant_blocks[tenant.name], held.lease, held.asked
        counted["asked"] += len(asked)
        sources = lease.sources
        while sources:  # most often all are of one tier
            source = sources[0]
            same = sources.count(source)
            counted[f"hit_{source}"] += same
            sources = [] if same == len(sources) else [each for each in sources if each != source]
        if len(lease):
            prefix = Prefix(tenant.name, asked.namespace.fingerprint, asked.keys[0])
            self.hot.add(prefix, len(lease))
        if len(lease) < len(asked):
            reason = held.miss or Miss.TOO_SLOW
            counted[f"miss_{reason.value}"] += len(asked) - len(lease)

    def quota_of(self, tenant: Tenant) -> Quota | None:
        """The tenant's, which its sessions share. The first time, the store's tables are read."""
        if tenant.quota_bytes is None:
            return None
        if tenant.name not in self.quotas:
            self.quotas[tenant.name] = Quota(self.store, tenant, tenant.quota_bytes)
        return self.quotas[tenant.name]

    def admits(self, tenant: Tenant, namespace: Namespace) -> bool:
        """Whether the tenant may write into one more namespace, if it is one more.

        Those of this user may: they can do worse.
        """
        return not tenant.secret or self._written[tenant.name].admits(namespace)

    def owner(self, namespace: Namespace) -> str | None:
        """Whose namespace it is, where that is somebody with a token."""
        return self._owners.get(namespace.salt[:MARK_CHARACTERS])

    def stats_of(self, tenant: Tenant) -> Stats:
        """What concerns nobody else: blocks served and missed, and what it holds of its quota."""
        counted, quota = self.tenant_blocks[tenant.name], self.quota_of(tenant)
        counters = {"asked_blocks": counted["asked"]}
        if quota is not None:
            counters |= {"quota_bytes": quota.limit_bytes, "held_bytes": quota.held_bytes}
            counters |= quota.counters
        return Stats({}, {}, _part(counted, "hit_"), _part(counted, "miss_"), counters)

    def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` in the loop when a block has arrived, or something was written."""
        self._watchers.add(changed)

    def unwatch(self, changed: Callable[[], None]) -> None:
        self._watchers.discard(changed)

    def close(self) -> None:
        self.warming.close()
        self._unsubscribe()
        for session in list(self.sessions):
            self.end(session)
        for session, timer in list(self._resting.items()):
            timer.cancel()
            self._rested(session)

    def _rested(self, session: Session) -> None:
        del self._resting[session]
        session.close()

    def _wake(self) -> None:
        """From any thread, with the store's lock held: once for all that happens until we look."""
        if not self._awake:
            self._awake = True
            self._loop.call_soon_threadsafe(self._look)

    def _look(self) -> None:
        self._awake = False
        for changed in list(self._watchers):
            changed()


def _who(session: Session) -> str:
    """As the log names a client."""
    tenant = session.tenant
    return session.peer if tenant == LOCAL else f"{session.peer} of {tenant.name}"


def _part(counted: Counter[str], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): n for name, n in counted.items() if name.startswith(prefix)}

"""The state of a daemon at one moment: what its metrics and its page are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from kvstore.answers import NamespaceUsage, Stats
from kvstore.daemon.service import Service
from kvstore.histogram import Distribution


class Client(NamedTuple):
    """One session."""

    tenant: str
    peer: str
    leases: int
    reservations: int
    in_flight_bytes: int


class QuotaUse(NamedTuple):
    """Of one tenant that has a quota. The counters are of blocks."""

    held_bytes: int
    quota_bytes: int
    evicted: int  # its own, to make room for others of its own
    refused: int  # for which no room could be made


class Status(NamedTuple):
    """Plain values, taken in one go; nothing in it changes any more."""

    stats: Stats
    distributions: Mapping[str, Distribution]
    usage: list[NamespaceUsage]
    clients: list[Client]
    tenants: Mapping[str, Mapping[str, int]]  # blocks by "asked", "hit_<tier>", "miss_<reason>"
    quotas: Mapping[str, QuotaUse]


def read_status(service: Service) -> Status:
    """In the event loop's thread. Raises ClosedError where the store has ended."""
    return Status(
        service.store.stats(),
        service.store.distributions(),
        service.store.usage(),
        [
            Client(
                session.tenant.name,
                session.peer,
                len(session.leases),
                len(session.reservations),
                session.in_flight_bytes,
            )
            for session in service.sessions
        ],
        {tenant: dict(blocks) for tenant, blocks in service.tenant_blocks.items()},
        {
            tenant: QuotaUse(
                quota.held_bytes,
                quota.limit_bytes,
                quota.counters["quota_evicted_blocks"],
                quota.counters["quota_refused_blocks"],
            )
            for tenant, quota in service.quotas.items()
        },
    )


def why_not_ready(service: Service) -> str | None:
    """What keeps the daemon from doing all of its work, or None. Raises ClosedError."""
    if service.stopping:
        return "stopping: what is only in RAM is being written to NVMe"
    nvme = service.store.stats().nvme
    if nvme.get("read_only"):
        return "NVMe takes no more blocks: the log says why; what it has is still served"
    if nvme.get("breaker_open"):
        return "NVMe fails or does not answer: the log says why; RAM is served"
    return None

"""What the store can say of itself: gauges, counters, distributions, and who holds what."""

from __future__ import annotations

from kvstore.answers import NVME, RAM, NamespaceUsage, Stats
from kvstore.below import Below
from kvstore.histogram import Distribution
from kvstore.hub import Hub
from kvstore.lookup import Lookup


class Measures:
    """Read-only. Takes the hub's lock itself; raises ClosedError after the store's end."""

    def __init__(self, hub: Hub, below: Below | None, lookup: Lookup) -> None:
        self._hub = hub
        self._below = below
        self._lookup = lookup

    def stats(self) -> Stats:
        hub, below = self._hub, self._below
        nvme, queues = {}, {}
        if below is not None:
            nvme = {**below.tier.stats(), "breaker_open": not below.transfers.allows()}
        with hub.lock:
            hub.check_open()
            if below is not None:
                queues = {
                    "demotion_blocks": below.demotions.waiting_locked(),
                    "promotion_bytes": below.promotions.queued_bytes,
                }
            space = hub.slots.space
            ram = {
                "blocks": len(hub.slots),
                "used_bytes": space.used_bytes,
                "capacity_bytes": space.capacity_bytes,
                # That made room, as on NVMe; what was dropped on request is another matter.
                "evicted_blocks": hub.eviction_age_s.read().observed,
                "pinned_blocks": int((hub.slots.index.pins > 0).sum()),
            }
            return Stats(ram, nvme, dict(hub.hits), dict(hub.misses), dict(hub.counters), queues)

    def distributions(self) -> dict[str, Distribution]:
        hub, below = self._hub, self._below
        with hub.lock:
            hub.check_open()
            read = {"ram_eviction_age_s": hub.eviction_age_s.read()}
            if below is not None:
                read["promotion_s"] = hub.promotion_s.read()
                read["demotion_s"] = hub.demotion_s.read()
        if below is not None:
            read["nvme_eviction_age_s"] = below.tier.eviction_age_s()
        return read

    def usage(self) -> list[NamespaceUsage]:
        hub, below = self._hub, self._below
        with hub.lock:
            hub.check_open()
            known = self._lookup.namespaces_locked()
            held = {RAM: hub.slots.usage()}
        if below is not None:
            held[NVME] = dict(below.tier.usage())
        return [
            NamespaceUsage(
                namespace,
                {tier: here[name].blocks for tier, here in held.items() if name in here},
                {tier: here[name].nbytes for tier, here in held.items() if name in here},
            )
            for name, namespace in known.items()
        ]

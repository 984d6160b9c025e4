"""The daemon's metrics in Prometheus' text format. docs/operations.md says what each means."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.registry import Collector

from kvstore.answers import NVME, RAM
from kvstore.daemon.status import Status
from kvstore.histogram import Distribution
from kvstore.tier import Miss, Refusal
from kvstore.version import __version__

TIERS = (RAM, NVME)
REASONS = [reason.value for reason in Miss]

# Counters of the store that stand for themselves: name here, what it counts.
COUNTED = {
    "served_bytes": "Bytes of blocks that leases gave to clients.",
    "committed_blocks": "Blocks that clients were the first to write.",
    "committed_bytes": "Bytes of blocks that clients were the first to write.",
    "duplicate_blocks": "Blocks that a client wrote while another did, and that were dropped.",
    "coalesced_blocks": "Blocks asked for while they were already on their way from NVMe.",
    "promoted_blocks": "Blocks brought from NVMe to RAM.",
    "promoted_bytes": "Bytes brought from NVMe to RAM.",
    "demoted_blocks": "Blocks written from RAM to NVMe, or found to be there already.",
    "demoted_bytes": "Bytes of blocks written from RAM to NVMe, before the codec.",
    "acquires_shortened": "Leases cut short because RAM or the promotion queue was full.",
    "reserve_refused_blocks": "Blocks for which RAM had no room that could be made.",
    "prefetch_refused_blocks": "Blocks whose prefetch was refused: RAM or the queue was full.",
}
NVME_COUNTED = {
    "read_bytes": "Bytes read from the drive, as stored.",
    "written_bytes": "Bytes written to the drive, as stored.",
    "write_errors": "Blocks that the drive refused to take.",
    "unreadable_blocks": "Blocks that the drive did not give back.",
}
TIER_GAUGES = {
    "capacity_bytes": "Room for blocks.",
    "used_bytes": "Bytes taken by blocks, and by slots that are being filled.",
    "blocks": "Blocks that may be served.",
}
# Why a block stays in RAM only: counter of the store, and reason.
NOT_DEMOTED = {
    "demotions_dropped_blocks": "queue_full",
    "demotions_failed_blocks": "tier_failed",
    **{f"demotions_refused_{refusal.value}_blocks": refusal.value for refusal in Refusal},
}


def render(status: Status, not_ready: str | None) -> bytes:
    """The body of `GET /metrics`. Takes milliseconds; may run in any thread."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatusCollector(status, not_ready))
    ProcessCollector(registry=registry)
    return generate_latest(registry)


class StatusCollector(Collector):
    """Every metric of ours, from one `Status`."""

    def __init__(self, status: Status, not_ready: str | None) -> None:
        self._status = status
        self._not_ready = not_ready

    def collect(self) -> Iterable[Metric]:
        build = {"version": __version__, "python": platform.python_version()}
        yield InfoMetricFamily("kvstore_build", "What is running.", build)
        yield _gauge("ready", "1 when /readyz says so, else 0.", self._not_ready is None)
        yield from self._tiers()
        yield from self._blocks()
        yield from self._moves()
        yield from self._clients()
        yield from self._tenants()
        if self._status.stats.nvme:
            yield from self._drive()

    def _tiers(self) -> Iterator[Metric]:
        stats, read = self._status.stats, self._status.distributions
        held = {tier: stats for tier, stats in ((RAM, stats.ram), (NVME, stats.nvme)) if stats}
        for name, text in TIER_GAUGES.items():
            yield _gauges(f"tier_{name}", text, "tier", {t: held[t][name] for t in held})
        fill = {t: held[t]["used_bytes"] / max(1, held[t]["capacity_bytes"]) for t in held}
        yield _gauges("tier_fill_ratio", "Used of capacity, from 0 to 1.", "tier", fill)
        ages = {tier: read[f"{tier}_eviction_age_s"] for tier in held}
        yield _counters(
            "evicted_blocks",
            "Blocks that had to make room for others.",
            "tier",
            {tier: age.observed for tier, age in ages.items()},
        )
        text = "Time since the last use of blocks that had to make room for others."
        yield _histogram("eviction_age_seconds", text, ages)
        pinned, text = stats.ram["pinned_blocks"], "Blocks of RAM in use, or queued."
        yield _gauge("pinned_blocks", text, pinned)
        held_of = sum(bool(each.blocks) for each in self._status.usage)
        yield _gauge("namespaces", "Namespaces of which blocks are held.", held_of)

    def _blocks(self) -> Iterator[Metric]:
        """For blocks asked of the store: asked = hits of all tiers + misses of all reasons."""
        stats = self._status.stats
        hits = {tier: stats.hits.get(tier, 0) for tier in TIERS}
        yield _counters("hit_blocks", "Blocks served, by the tier they were in.", "tier", hits)
        misses = {reason: stats.misses.get(reason, 0) for reason in REASONS}
        yield _counters("miss_blocks", "Blocks not served, by reason.", "reason", misses)
        for name, text in COUNTED.items():
            yield _counter(name, text, stats.counters.get(name, 0))

    def _moves(self) -> Iterator[Metric]:
        stats, read = self._status.stats, self._status.distributions
        yield _counters(
            "not_demoted_blocks",
            "Blocks that were to be written to NVMe, but stay in RAM only, by reason.",
            "reason",
            {reason: stats.counters.get(name, 0) for name, reason in NOT_DEMOTED.items()},
        )
        if not stats.queues:
            return
        text = "Time from asked for to in RAM, of each block brought from NVMe."
        yield _histogram("promotion_latency_seconds", text, {"": read["promotion_s"]})
        text = "Time from committed to safe on NVMe, of each block."
        yield _histogram("demotion_latency_seconds", text, {"": read["demotion_s"]})
        waiting = stats.queues
        text = "Blocks waiting to be written to NVMe."
        yield _gauge("demotion_queue_blocks", text, waiting["demotion_blocks"])
        text = "Bytes of blocks being read from NVMe, or waiting for it."
        yield _gauge("promotion_queue_bytes", text, waiting["promotion_bytes"])

    def _clients(self) -> Iterator[Metric]:
        clients = self._status.clients
        yield _gauge("sessions", "Clients connected.", len(clients))
        open_leases = sum(client.leases for client in clients)
        yield _gauge("leases_open", "Leases that clients hold.", open_leases)
        unwritten = sum(client.reservations for client in clients)
        yield _gauge("reservations_open", "Reservations yet to be committed.", unwritten)
        in_flight_bytes = sum(client.in_flight_bytes for client in clients)
        yield _gauge("in_flight_bytes", "Bytes leased and reserved by clients.", in_flight_bytes)

    def _tenants(self) -> Iterator[Metric]:
        """For each tenant: asked = hits + misses, exactly, of leases that have ended."""
        asked = CounterMetricFamily(
            "kvstore_tenant_asked_blocks",
            "Blocks that ended leases had asked for.",
            labels=["tenant"],
        )
        hits = CounterMetricFamily(
            "kvstore_tenant_hit_blocks", "Of these, served.", labels=["tenant", "tier"]
        )
        misses = CounterMetricFamily(
            "kvstore_tenant_miss_blocks", "Of these, not served.", labels=["tenant", "reason"]
        )
        for tenant, blocks in sorted(self._status.tenants.items()):
            asked.add_metric([tenant], blocks.get("asked", 0))
            for tier in TIERS:
                hits.add_metric([tenant, tier], blocks.get(f"hit_{tier}", 0))
            for reason in REASONS:
                misses.add_metric([tenant, reason], blocks.get(f"miss_{reason}", 0))
        yield from (asked, hits, misses)
        yield from self._quotas()

    def _quotas(self) -> Iterator[Metric]:
        quotas = sorted(self._status.quotas.items())
        if not quotas:
            return
        text = "Bytes of blocks that the tenant holds, wherever they lie."
        held = {tenant: use.held_bytes for tenant, use in quotas}
        yield _gauges("tenant_held_bytes", text, "tenant", held)
        limits = {tenant: use.quota_bytes for tenant, use in quotas}
        yield _gauges("tenant_quota_bytes", "What the tenant may hold.", "tenant", limits)
        text = "The tenant's own blocks that made room for others of its own."
        evicted = {tenant: use.evicted for tenant, use in quotas}
        yield _counters("tenant_quota_evicted_blocks", text, "tenant", evicted)
        text = "Blocks that the tenant may not write: its quota is used up by what is leased."
        refused = {tenant: use.refused for tenant, use in quotas}
        yield _counters("tenant_quota_refused_blocks", text, "tenant", refused)

    def _drive(self) -> Iterator[Metric]:
        nvme = self._status.stats.nvme
        for name, text in NVME_COUNTED.items():
            yield _counter(f"nvme_{name}", text, nvme.get(name, 0))
        text = "Bytes of blocks written since midnight UTC, before the codec."
        yield _gauge("nvme_written_today_bytes", text, nvme["written_today_bytes"])
        if "daily_write_bytes" in nvme:
            text = "What may be written in a day; absent where there is no limit."
            yield _gauge("nvme_daily_write_budget_bytes", text, nvme["daily_write_bytes"])
        text = "1 once a fault of the drive has ended all writing, else 0."
        yield _gauge("nvme_read_only", text, nvme["read_only"])
        text = "1 while NVMe keeps failing or does not answer, and is left alone, else 0."
        yield _gauge("nvme_breaker_open", text, nvme["breaker_open"])


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"kvstore_{name}", text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"kvstore_{name}", text, value)


def _gauges(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"kvstore_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _counters(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"kvstore_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _histogram(name: str, text: str, by_tier: Mapping[str, Distribution]) -> Metric:
    """With a label for the tier, or without where there is but one, named ""."""
    labels = [] if "" in by_tier else ["tier"]
    family = HistogramMetricFamily(f"kvstore_{name}", text, labels=labels)
    for tier, read in by_tier.items():
        bounds = [*map(str, read.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(map(float, read.counts)), strict=True))
        family.add_metric([tier] if labels else [], buckets, read.total)
    return family

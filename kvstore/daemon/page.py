"""The live page, and what it is told: plain values, ready for JSON."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvstore.answers import NVME, RAM, NamespaceUsage
from kvstore.daemon.history import FLOWS
from kvstore.daemon.status import Status
from kvstore.histogram import Distribution
from kvstore.hot import HotPrefix
from kvstore.version import __version__

ROWS = 20  # of a list; the page says how many there are in all
TEXT = 80  # characters of a name that a client has chosen


class Page:
    """One file of HTML, and the policy under which a browser runs nothing but what is in it."""

    def __init__(self, text: str) -> None:
        self.text = text
        script, style = (_digests(tag, text) for tag in ("script", "style"))
        self.policy = (
            f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )


def describe(status: Status, hottest: Sequence[HotPrefix]) -> dict[str, Any]:
    """The body of `GET /api/status`, but for its history."""
    stats, read = status.stats, status.distributions
    models = {held.namespace.fingerprint: held.namespace for held in status.usage}
    return {
        "version": __version__,
        "tiers": _tiers(status),
        "nvme": stats.nvme,
        "hits": {tier: stats.hits.get(tier, 0) for tier in (RAM, NVME)},
        "misses": {reason: count for reason, count in stats.misses.items() if count},
        "flows": {name: stats.counters.get(name, 0) for name in FLOWS},
        "queues": stats.queues,
        "latency": {
            name: _quantiles(read[name]) for name in ("promotion_s", "demotion_s") if name in read
        },
        "clients": _clients(status),
        "tenants": _tenants(status),
        "namespaces": _namespaces(status.usage),
        "prefixes": [
            {
                "key": hot.prefix.key.hex()[:12],
                "tenant": hot.prefix.tenant,
                "model": _cut(models[hot.prefix.namespace].model),
                "share": hot.share,
                "longest_tokens": hot.longest_blocks * models[hot.prefix.namespace].block_tokens,
            }
            for hot in hottest
            if hot.prefix.namespace in models
        ],
    }


def _tiers(status: Status) -> list[dict[str, Any]]:
    return [
        {
            "name": tier,
            "blocks": held["blocks"],
            "used_bytes": held["used_bytes"],
            "capacity_bytes": held["capacity_bytes"],
            "evicted_blocks": age.observed,
            "eviction_age_s": age.quantile(0.5),
        }
        for tier, held in ((RAM, status.stats.ram), (NVME, status.stats.nvme))
        if held
        for age in [status.distributions[f"{tier}_eviction_age_s"]]
    ]


def _clients(status: Status) -> dict[str, Any]:
    clients = sorted(status.clients, key=lambda client: -client.in_flight_bytes)
    return {
        "count": len(clients),
        "leases": sum(client.leases for client in clients),
        "reservations": sum(client.reservations for client in clients),
        "in_flight_bytes": sum(client.in_flight_bytes for client in clients),
        "pinned_blocks": status.stats.ram["pinned_blocks"],
        "most": [client._asdict() for client in clients[:ROWS]],
    }


def _tenants(status: Status) -> dict[str, Any]:
    busiest = sorted(status.tenants.items(), key=lambda item: -item[1].get("asked", 0))[:ROWS]
    rows = [
        {
            "name": name,
            "asked": blocks.get("asked", 0),
            "hits": {tier: blocks.get(f"hit_{tier}", 0) for tier in (RAM, NVME)},
            "sessions": sum(client.tenant == name for client in status.clients),
            "quota": status.quotas[name]._asdict() if name in status.quotas else None,
        }
        for name, blocks in busiest
    ]
    return {"count": len(status.tenants), "most": rows}


def _namespaces(usage: Sequence[NamespaceUsage]) -> dict[str, Any]:
    largest = sorted(usage, key=lambda held: -sum(held.nbytes.values()))[:ROWS]
    rows = [
        {
            "model": _cut(held.namespace.model),
            "fingerprint": held.namespace.fingerprint.hex()[:8],
            "kv_dtype": _cut(held.namespace.kv_dtype),
            "block_tokens": held.namespace.block_tokens,
            "adapter": bool(held.namespace.adapter),
            "salted": bool(held.namespace.salt),  # and never with what
            "blocks": held.blocks,
            "bytes": held.nbytes,
        }
        for held in largest
    ]
    return {"count": len(usage), "most": rows}


def _quantiles(read: Distribution) -> Mapping[str, float | None]:
    return {"p50_s": read.quantile(0.5), "p95_s": read.quantile(0.95)}


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else text[: TEXT - 1] + "…"


def _digests(tag: str, text: str) -> str:
    """What a policy names the contents of these elements by: CSP level 3, section 2.3.1."""
    contents = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digests = (hashlib.sha256(content.encode()).digest() for content in contents)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

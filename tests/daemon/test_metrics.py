"""The metrics: named as Prometheus wants them, and true."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvstore.client.client import StoreClient
from kvstore.daemon.metrics import render
from kvstore.daemon.session import Session
from kvstore.daemon.status import read_status, why_not_ready
from kvstore.hashing import Chain
from kvstore.retention import Retention
from kvstore.tenant import LOCAL, Tenant
from kvstore.tiers.nvme import NvmeTier
from tests.daemon.doors import Daemon
from tests.store.rig import BLOCK, PATIENCE_S, Rig, chain, get, put

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "packaging" / "grafana" / "kvstore.json"
# Units that Prometheus has a base unit for: https://prometheus.io/docs/practices/naming/
NOT_BASE_UNITS = {
    *("ms", "us", "ns", "milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days"),
    *("kb", "mb", "gb", "kib", "mib", "gib", "kilobytes", "megabytes", "gigabytes", "bits"),
    *("percent", "pct"),
}
SOMETIMES = {  # only where there is a budget, or a quota
    "kvstore_nvme_daily_write_budget_bytes",
    *("kvstore_tenant_held_bytes", "kvstore_tenant_quota_bytes"),
    *(f"kvstore_tenant_quota_{done}_blocks_total" for done in ("evicted", "refused")),
}
TYPES = {"counter", "gauge", "histogram"}


class Scraped:
    """What `GET /metrics` says, as Prometheus would read it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = list(text_string_to_metric_families(text))
        self.samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in self.families
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        return self.samples[f"kvstore_{name}", tuple(sorted(labels.items()))]

    def total(self, name: str, **labels: str) -> float:
        """Over all labels but those given."""
        return sum(
            value
            for (other, theirs), value in self.samples.items()
            if other == f"kvstore_{name}" and labels.items() <= dict(theirs).items()
        )


def scrape(daemon: Daemon) -> Scraped:
    service = daemon.service
    body = daemon.call(lambda: render(read_status(service), why_not_ready(service)))
    return Scraped(body.decode())


def traffic(store: StoreClient, seed: int, count: int = 150) -> Counter[str]:
    """Random chains, more than RAM holds; returns what was asked for and served."""
    rng, seen = random.Random(seed), Counter[str]()
    for _ in range(count):
        blocks = chain(rng.randint(1, 12), seed=rng.randint(0, 25))
        with store.acquire(blocks) as lease:
            lease.wait()
            served = len(lease)
            seen.update(lease.sources)
        seen["asked"] += len(blocks)
        if served < len(blocks):
            seen["committed"] += put(store, blocks)
            assert store.flush(PATIENCE_S)  # or all of RAM is pinned, until a slow drive has it
    return seen


# ---- rules


def test_every_metric_follows_the_rules(daemon: Daemon, client: StoreClient) -> None:
    traffic(client, seed=1, count=20)
    scraped = scrape(daemon)
    lines = scraped.text.splitlines()
    for family in scraped.families:
        name = family.name
        words = name.split("_")
        exposed = f"{name}_total" if family.type == "counter" else name
        assert lines.count(f"# TYPE {exposed} {family.type}") == 1, name
        assert sum(line.startswith(f"# HELP {exposed} ") for line in lines) == 1, name
        assert len(family.documentation) > 5, name
        assert family.documentation.endswith("."), name
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name), name
        assert name.startswith(("kvstore_", "process_")), name
        assert family.type in TYPES, name
        assert not NOT_BASE_UNITS & set(words), name
        assert not TYPES & set(words), name
        assert words[-1] not in ("total", "count", "sum", "bucket"), name
        for sample in family.samples:
            assert sample.value >= 0, sample
            assert all(re.fullmatch(r"[a-z]+", label) for label in sample.labels), sample
            assert all(sample.labels.values()), sample


def test_no_sample_stands_twice(daemon: Daemon, client: StoreClient) -> None:
    traffic(client, seed=1, count=20)
    scraped = scrape(daemon)
    names = [family.name for family in scraped.families]
    assert len(names) == len(set(names))
    told = [line.rpartition(" ")[0] for line in scraped.text.splitlines() if line[0] != "#"]
    assert len(told) == len(set(told)) == len(scraped.samples)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool here")
def test_promtool_finds_nothing_wrong(daemon: Daemon, client: StoreClient) -> None:
    traffic(client, seed=1, count=20)
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=scrape(daemon).text.encode(),
        capture_output=True,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_histograms_add_up(daemon: Daemon, rig: Rig, client: StoreClient) -> None:
    traffic(client, seed=2)
    assert rig.store.flush(PATIENCE_S)
    scraped = scrape(daemon)
    for family in scraped.families:
        if family.type != "histogram":
            continue
        series: dict[str, list[tuple[float, float]]] = {}
        for sample in family.samples:
            tier = sample.labels.get("tier", "")
            if sample.name.endswith("_bucket"):
                series.setdefault(tier, []).append((float(sample.labels["le"]), sample.value))
        for tier, buckets in series.items():
            labels = {"tier": tier} if tier else {}
            name = family.name.removeprefix("kvstore_")
            assert buckets == sorted(buckets), family.name
            counts = [count for _, count in buckets]
            assert counts == sorted(counts), family.name
            assert buckets[-1] == (float("inf"), scraped.value(f"{name}_count", **labels))
            assert scraped.value(f"{name}_count", **labels) > 0 or tier == "nvme", name


# ---- identities


def test_every_block_is_accounted_for(daemon: Daemon, rig: Rig, client: StoreClient) -> None:
    seen = traffic(client, seed=3)
    assert rig.store.flush(PATIENCE_S)
    daemon.until(lambda: not any(session.leases for session in daemon.service.sessions))
    scraped = scrape(daemon)

    assert scraped.value("tenant_asked_blocks_total", tenant="local") == seen["asked"]
    assert scraped.total("tenant_hit_blocks_total") + scraped.total(
        "tenant_miss_blocks_total"
    ) == scraped.total("tenant_asked_blocks_total")
    for tier in ("ram", "nvme"):
        assert seen[tier] > 0
        assert scraped.value("tenant_hit_blocks_total", tenant="local", tier=tier) == seen[tier]
        assert scraped.value("hit_blocks_total", tier=tier) == seen[tier]
    assert scraped.total("hit_blocks_total") + scraped.total("miss_blocks_total") == seen["asked"]

    served = seen["ram"] + seen["nvme"]
    assert scraped.value("served_bytes_total") == served * BLOCK
    assert scraped.value("committed_blocks_total") == seen["committed"]
    assert scraped.value("committed_bytes_total") == seen["committed"] * BLOCK
    for way in ("promoted", "demoted"):
        blocks = scraped.value(f"{way}_blocks_total")
        assert blocks > 0
        assert scraped.value(f"{way}_bytes_total") == blocks * BLOCK
    assert scraped.value("promotion_latency_seconds_count") == scraped.value(
        "promoted_blocks_total"
    )
    assert scraped.value("demotion_latency_seconds_count") == scraped.value("demoted_blocks_total")

    for tier in ("ram", "nvme"):
        age = scraped.value("eviction_age_seconds_count", tier=tier)
        assert scraped.value("evicted_blocks_total", tier=tier) == age
    came = seen["committed"] + scraped.value("promoted_blocks_total")
    gone = scraped.value("evicted_blocks_total", tier="ram")
    assert scraped.value("tier_blocks", tier="ram") == came - gone
    assert gone > 0


def test_tenants_one_by_one(daemon: Daemon) -> None:
    """Also where a client may not have all that it asks for."""
    tenants = [LOCAL, Tenant("one", secret=b"1"), Tenant("two", secret=b"2")]
    asked = Counter[str]()

    def work() -> None:
        rng = random.Random(4)
        sessions = [daemon.service.open(tenant, "here") for tenant in tenants]
        for _ in range(120):
            session, blocks = rng.choice(sessions), chain(rng.randint(1, 9), seed=rng.randint(0, 9))
            if rng.random() < 0.5:
                session.commit(session.reserve(_own(session, blocks), Retention())[0])
                continue
            number, _ = session.acquire(_own(session, blocks), 5.0)
            asked[session.tenant.name] += len(blocks)
            if rng.random() < 0.7:
                session.release(number)
        for session in sessions:
            daemon.service.end(session)

    daemon.call(work)
    scraped = scrape(daemon)
    for tenant in tenants:
        hits = scraped.total("tenant_hit_blocks_total", tenant=tenant.name)
        misses = scraped.total("tenant_miss_blocks_total", tenant=tenant.name)
        assert scraped.value("tenant_asked_blocks_total", tenant=tenant.name) == hits + misses
        assert hits + misses == asked[tenant.name] > 0
        assert hits > 0
    assert scraped.total("tenant_hit_blocks_total") == scraped.total("hit_blocks_total")


def test_a_tenant_with_a_quota(daemon: Daemon) -> None:
    small = Tenant("small", secret=b"s", quota_bytes=10 * BLOCK)

    def work() -> None:
        session = daemon.service.open(small, "here")
        for seed in range(3):
            session.commit(session.reserve(_own(session, chain(4, seed=seed)), Retention())[0])
        for seed in (1, 2):  # leased, these cannot make room
            session.acquire(_own(session, chain(4, seed=seed)), 5.0)
        session.reserve(_own(session, chain(6, seed=9)), Retention())

    daemon.call(work)
    scraped = scrape(daemon)
    assert scraped.value("tenant_quota_bytes", tenant="small") == 10 * BLOCK
    assert scraped.value("tenant_held_bytes", tenant="small") == 8 * BLOCK
    assert scraped.value("tenant_quota_evicted_blocks_total", tenant="small") == 4
    assert scraped.value("tenant_quota_refused_blocks_total", tenant="small") == 4


def _own(session: Session, blocks: Chain) -> Chain:
    number = session.open_namespace(blocks.namespace.to_json())
    return session.chain(number, blocks.parent, blocks.keys)


def test_what_is_held_is_told(daemon: Daemon, client: StoreClient) -> None:
    put(client, chain(3))
    idle = scrape(daemon)
    assert idle.value("sessions") == idle.value("namespaces") == 1
    assert idle.value("leases_open") == idle.value("in_flight_bytes") == 0
    with client.acquire(chain(3)), client.reserve(chain(2, seed=9)):
        busy = scrape(daemon)
        assert busy.value("leases_open") == busy.value("reservations_open") == 1
        assert busy.value("in_flight_bytes") == 5 * BLOCK
        assert busy.value("pinned_blocks") >= 3
    daemon.until(lambda: not any(session.in_flight_bytes for session in daemon.service.sessions))
    assert scrape(daemon).value("in_flight_bytes") == 0


def test_what_waits_for_the_drive_is_told(daemon: Daemon, rig: Rig, client: StoreClient) -> None:
    rig.gate.hold("write")
    for seed in range(rig.hub.bounds.transfers_in_flight):
        put(client, chain(1, seed=100 + seed))
        rig.gate.arrived("write")
    put(client, chain(4, seed=1))
    put(client, chain(2, seed=2))
    assert scrape(daemon).value("demotion_queue_blocks") == 6
    rig.gate.release()
    assert rig.store.flush(PATIENCE_S)
    assert scrape(daemon).value("demotion_queue_blocks") == 0

    rig.drop_from_ram(chain(4, seed=1))
    rig.gate.hold("read")
    with client.acquire(chain(4, seed=1)) as lease:
        assert scrape(daemon).value("promotion_queue_bytes") == 4 * BLOCK
        rig.gate.release()
        assert lease.wait() == 4
    assert scrape(daemon).value("promotion_queue_bytes") == 0


def test_the_budget_of_the_day(daemon: Daemon, rig: Rig, client: StoreClient) -> None:
    put(client, chain(5))
    assert rig.store.flush(PATIENCE_S)
    assert scrape(daemon).value("nvme_written_today_bytes") == 5 * BLOCK
    assert "write_budget" not in scrape(daemon).text
    assert isinstance(rig.nvme, NvmeTier)
    rig.nvme._writes._budget.daily_bytes = 1 << 30
    assert scrape(daemon).value("nvme_daily_write_budget_bytes") == 1 << 30


def test_the_age_of_what_is_evicted(daemon: Daemon, rig: Rig, client: StoreClient) -> None:
    """An hour unused, and then others want the room."""
    put(client, chain(10))
    assert rig.store.flush(PATIENCE_S)
    with rig.hub.lock:
        rig.hub.slots.index.used_s[:] -= 3_600.0
    assert get(client, chain(3)) == 3  # and so these three are young
    for seed in range(1, 7):
        put(client, chain(9, seed=seed))
        assert rig.store.flush(PATIENCE_S)
    put(client, chain(7, seed=7))
    scraped = scrape(daemon)
    assert scraped.value("evicted_blocks_total", tier="ram") == 7
    buckets = {
        dict(labels)["le"]: value
        for (name, labels), value in scraped.samples.items()
        if name == "kvstore_eviction_age_seconds_bucket" and ("tier", "ram") in labels
    }
    assert buckets["900.0"] == 0
    assert buckets["14400.0"] == 7


def test_no_drive_no_metrics_of_one(tmp_path: Path) -> None:
    rig = Rig(None)
    try:
        with Daemon(rig.store, tmp_path / "kvstore.sock") as daemon, daemon.connect() as client:
            put(client, chain(3))
            scraped = scrape(daemon)
    finally:
        rig.finish()
    assert "kvstore_nvme" not in scraped.text
    assert "promotion_latency" not in scraped.text
    assert scraped.value("tier_blocks", tier="ram") == 3
    with pytest.raises(KeyError):
        scraped.value("tier_blocks", tier="nvme")


# ---- what is written about them


def exported(scraped: Scraped) -> set[str]:
    """Names that a query may use."""
    return {name for name, _ in scraped.samples} | {
        sample.name.removesuffix("_bucket")
        for family in scraped.families
        for sample in family.samples
    }


def dashboard_queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def test_the_dashboard_asks_for_nothing_else(daemon: Daemon, client: StoreClient) -> None:
    traffic(client, seed=1, count=5)
    asked = {
        name
        for query in dashboard_queries()
        for name in re.findall(r"\b(?:kvstore|process)_\w+", query)
    }
    assert asked - exported(scrape(daemon)) - SOMETIMES == set()
    assert len(asked) > 20


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool here")
def test_prometheus_understands_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": "kvstore:query", "labels": {"number": str(number)}, "expr": query}
        for number, query in enumerate(dashboard_queries())
    ]
    file = tmp_path / "rules.json"  # which is YAML
    text = json.dumps({"groups": [{"name": "dashboard", "rules": rules}]})
    file.write_text(text.replace("$__rate_interval", "1m"))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_metric_is_documented(daemon: Daemon, client: StoreClient) -> None:
    traffic(client, seed=1, count=5)
    page = (ROOT / "docs" / "operations.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `kvstore_")]
    documented = {name for row in rows for name in re.findall(r"`(kvstore_\w+)", row)}
    ours = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in scrape(daemon).families
        if family.name.startswith("kvstore_")
    }
    assert documented == ours | SOMETIMES

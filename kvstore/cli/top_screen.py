"""What `kvstore top` shows, drawn from one look at a daemon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvstore.quantities import format_size, format_time

NAMES = {"ram": "RAM", "nvme": "NVMe", "remote": "remote"}
BAR_COLUMNS = 24
SHOWN_SESSIONS = 12  # those that hold most


def draw(look: Mapping[str, Any]) -> RenderableType:
    head = (
        f"{look['store']}  kvstore {look['version']}, process {look['pid']}, "
        f"for {format_time(look['uptime_s'])}"
    )
    return Group(Text(head, style="bold"), _tiers(look), _flows(look), _sessions(look))


def _tiers(look: Mapping[str, Any]) -> Table:
    table = Table("tier", "full", "", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("used", "of", "blocks", "hit rate", "ever"):
        table.add_column(name, justify="right")
    for tier, held in look["tiers"].items():
        used, capacity = held["used_bytes"], held["capacity_bytes"]
        table.add_row(
            NAMES[tier],
            ProgressBar(total=capacity, completed=used, width=BAR_COLUMNS),
            f"{used / capacity:.0%}",
            format_size(used),
            format_size(capacity),
            str(held["blocks"]),
            _share(look["hit_rate"], tier),
            _share(look["hit_rate_ever"], tier),
        )
    return table


def _share(rates: Mapping[str, float] | None, tier: str) -> str:
    return "" if rates is None else f"{rates.get(tier, 0.0):.1%}"


def _flows(look: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_row("asked for", f"{look['asked_blocks_per_s']:.0f} blocks/s")
    flows = [f"{name} {format_size(rate)}/s" for name, rate in look["bytes_per_s"].items()]
    table.add_row("bytes", ", ".join(flows))
    queued = look["queues"]
    if queued:
        table.add_row(
            "queued",
            f"{queued['demotion_blocks']} blocks to NVMe, "
            f"{format_size(queued['promotion_bytes'])} from there",
        )
    table.add_row("missed", _misses(look["misses"]))
    table.add_row("missed ever", _misses(look["misses_ever"]))
    return table


def _misses(misses: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in misses.items()) or "nothing"


def _sessions(look: Mapping[str, Any]) -> Table:
    sessions = sorted(look["sessions"], key=lambda each: each["in_flight_bytes"], reverse=True)
    table = Table("client", "tenant", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("leases", "reservations", "in flight"):
        table.add_column(name, justify="right")
    for each in sessions[:SHOWN_SESSIONS]:
        table.add_row(
            Text(each["peer"]),
            Text(each["tenant"]),
            str(each["leases"]),
            str(each["reservations"]),
            format_size(each["in_flight_bytes"]),
        )
    if len(sessions) > SHOWN_SESSIONS:
        table.add_row(f"and {len(sessions) - SHOWN_SESSIONS} more")
    return table

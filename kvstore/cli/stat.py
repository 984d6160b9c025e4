"""`kvstore stat`: what a store holds and how it fares, in a few lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.options import json_option
from kvstore.cli.target import WHICH, Place, connected, place_options
from kvstore.errors import RightsError
from kvstore.quantities import counted, format_size, format_time

if TYPE_CHECKING:
    from kvstore.settings import Settings

TIER_NAMES = {"ram": "RAM", "nvme": "NVMe"}


@click.command(
    short_help="Sum up a directory or a running daemon.",
    help=f"""Sum up a store: its size, its blocks, and whose they are.

    Of a daemon also how full its tiers are, what was served and what missed and why, and
    who is connected.

    {WHICH}

    \b
    kvstore stat ~/.cache/kvstore/blocks
    kvstore stat --store unix:///run/kvstore/kvstore.sock --json
    """,
)
@place_options()
@json_option
def stat(place: Place, settings: Settings, as_json: bool) -> None:
    from kvstore.cli.console import print_json

    report = directory_report(place) if place.url is None else daemon_report(place, settings)
    if as_json:
        print_json(report)
    elif place.url is None:
        _show_directory(report)
    elif "pid" in report:
        _show_daemon(report)
    else:
        _show_tenant(report)


def directory_report(place: Place) -> dict[str, Any]:
    """A directory that nobody uses, summed up. Changes nothing in it."""
    from kvstore.cli.listing import Listing, by_namespace
    from kvstore.tiers.nvme_verify import read_directory

    summary = read_directory(place.path)
    return {
        "store": str(place),
        "blocks": summary.blocks,
        "stored_bytes": summary.stored_bytes,
        "slab_bytes": summary.slab_bytes,
        "allocated_bytes": summary.allocated_bytes,
        "damaged_records": summary.damaged_records,
        "cut_off_blocks": summary.cut_off_blocks,
        "namespaces": by_namespace(Listing.of_directory(summary)),
    }


def daemon_report(place: Place, settings: Settings) -> dict[str, Any]:
    """A daemon, as it describes itself: to those who may not administer, what is their own."""
    from kvstore.client.inventory import ClientInventory

    with connected(place, settings) as client:
        stats = client.stats().to_dict()
        try:
            status = dict(ClientInventory(client).status())
        except RightsError:
            return {"store": str(place), **stats}
    namespaces = status.pop("namespaces")
    return {
        "store": str(place),
        **status,
        **stats,
        "namespaces": [
            {
                "fingerprint": each["fingerprint"],
                "namespace": json.loads(each["record"]),
                "tenant": each.get("tenant"),  # which older daemons do not say
                "tiers": {
                    tier: {"blocks": blocks, "stored_bytes": each["nbytes"][tier]}
                    for tier, blocks in each["blocks"].items()
                },
            }
            for each in namespaces
        ],
    }


def _show_directory(report: Mapping[str, Any]) -> None:
    from kvstore.cli.console import show

    show(
        f"{report['store']}\n"
        f"{counted(report['blocks'], 'block')}, {format_size(report['stored_bytes'])} "
        f"of {format_size(report['slab_bytes'])}; "
        f"{format_size(report['allocated_bytes'])} on disk\n"
    )
    if report["damaged_records"]:
        show(
            f"{counted(report['damaged_records'], 'damaged record')}; `kvstore verify` says more\n"
        )
    if report["cut_off_blocks"]:
        show(
            "the slab is shorter than its records say, by "
            f"{counted(report['cut_off_blocks'], 'block')}; `kvstore verify` says more\n"
        )
    _show_namespaces(report["namespaces"])


def _show_daemon(report: Mapping[str, Any]) -> None:
    from kvstore.cli.console import show

    show(
        f"{report['store']}: kvstore {report['version']}, process {report['pid']}, "
        f"for {format_time(report['uptime_s'])}\n"
    )
    for name, tier in (("RAM ", report["ram"]), ("NVMe", report["nvme"])):
        if tier:
            show(f"{name}  {_tier(tier)}\n")
    asked, served = counts(report)
    show(f"{counted(asked, 'block')} asked for{': ' if asked else ''}{served}\n")
    sessions = report["sessions"]
    show(f"clients: {len(sessions)}, this one among them\n")
    for each in sessions:
        show(
            f"  {each['peer']}, {each['tenant']}: {counted(each['leases'], 'lease')}, "
            f"{counted(each['reservations'], 'reservation')}, "
            f"{format_size(each['in_flight_bytes'])}\n"
        )
    _show_namespaces(report["namespaces"])


def _show_tenant(report: Mapping[str, Any]) -> None:
    from kvstore.cli.console import show

    asked, served = counts(report)
    show(f"{report['store']}: what is this tenant's own; the rest needs the right to admin\n")
    show(f"{counted(asked, 'block')} asked for{': ' if asked else ''}{served}\n")


def _show_namespaces(namespaces: list[dict[str, Any]]) -> None:
    from kvstore.cli.console import show, shown

    for each in namespaces:
        known = each["namespace"]
        model = f"{shown(known['model'])}, {known['kv_dtype']}" if known else "unknown model"
        held = "; ".join(f"{tier} {_blocks(there, known)}" for tier, there in each["tiers"].items())
        whose = f", tenant {each['tenant']}" if each.get("tenant") else ""
        salted = ", salted" if known and known["salt"] and not whose else ""
        show(f"{each['fingerprint']}  {held}: {model}{whose}{salted}\n")


def _blocks(there: Mapping[str, int], known: Mapping[str, Any] | None) -> str:
    tokens = f"{known['block_tokens'] * there['blocks']} tokens, " if known else ""
    return f"{counted(there['blocks'], 'block')}, {tokens}{format_size(there['stored_bytes'])}"


def _tier(tier: Mapping[str, Any]) -> str:
    share = tier["used_bytes"] / tier["capacity_bytes"]
    text = (
        f"{counted(tier['blocks'], 'block')}, {format_size(tier['used_bytes'])} of "
        f"{format_size(tier['capacity_bytes'])} ({share:.0%})"
    )
    more = {
        "pinned": tier.get("pinned_blocks"),
        "evicted": tier.get("evicted_blocks"),
        "written today": tier.get("written_today_bytes"),
    }
    for name, count in more.items():
        if count:
            text += f", {format_size(count) if 'today' in name else count} {name}"
    if tier.get("read_only"):
        text += ", READ-ONLY: writing has failed"
    if tier.get("breaker_open"):
        text += ", LEFT ALONE: it does not answer"
    return text


def counts(report: Mapping[str, Any]) -> tuple[int, str]:
    """Blocks asked for, and in words what became of them."""
    hits, misses = report["hits"], report["misses"]
    missed = sum(misses.values())
    parts = [
        f"{count} from {TIER_NAMES.get(tier, tier)}"
        for tier, count in sorted(hits.items())
        if count
    ]
    if missed:
        reasons = ", ".join(f"{count} {reason}" for reason, count in misses.items() if count)
        parts.append(f"{missed} missed ({reasons})")
    return sum(hits.values()) + missed, ", ".join(parts)

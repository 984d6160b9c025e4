"""`kvstore top`: a running daemon, live in the terminal."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.keep import time_option
from kvstore.cli.options import json_option
from kvstore.cli.target import Place, connected, daemon_options
from kvstore.errors import InputError

if TYPE_CHECKING:
    from kvstore.client.client import StoreClient
    from kvstore.settings import Settings

# Counters of the store that say how many bytes went which way.
FLOWS = {
    "served": "served_bytes",  # to engines
    "committed": "committed_bytes",  # by engines
    "promoted": "promoted_bytes",  # NVMe to RAM
    "demoted": "demoted_bytes",  # RAM to NVMe
}


@click.command(short_help="Watch a running daemon.")
@click.option("--once", is_flag=True, help="Look for one interval, print, and end.")
@click.option("--interval", default="1s", show_default=True, metavar="TIME", help="Between looks.")
@daemon_options()
@json_option
def top(once: bool, interval: str, place: Place, settings: Settings, as_json: bool) -> None:
    """Show a daemon live: tiers, hit rates, bytes that move, clients, queues.

    Ends with q or Ctrl-C. URL is the daemon of the settings (engine.store) or of the usual
    socket unless given. For scripts: --json, which looks once.

    \b
    kvstore top
    kvstore top --store unix:///run/kvstore/kvstore.sock --interval 5s
    kvstore top --json | jq .hit_rate
    """
    from kvstore.cli.console import out, print_json

    interval_s = time_option("--interval", interval)
    once = once or as_json
    if not once and not (sys.stdin.isatty() and out.is_terminal):
        raise InputError("this needs a terminal; --once prints one look, wherever it goes")
    with connected(place, settings) as client:
        looks = _looks(client, str(place))
        if not once:
            _watch(looks, interval_s)
            return
        look = looks(interval_s)
    if as_json:
        print_json(look)
    else:
        from kvstore.cli.top_screen import draw

        out.print(draw(look))


def _looks(client: StoreClient, store: str) -> Callable[[float], dict[str, Any]]:
    """Each call waits, and says what the daemon did since the last."""
    before = [_sample(client)]

    def look(wait_s: float) -> dict[str, Any]:
        time.sleep(wait_s)
        now = _sample(client)
        told = compare(store, before[0], now)
        before[0] = now
        return told

    return look


def _sample(client: StoreClient) -> dict[str, Any]:
    from kvstore.client.inventory import ClientInventory

    status = ClientInventory(client).status()
    stats = client.stats().to_dict()
    client.check_connected()
    return {**status, **stats, "at_s": time.monotonic()}


def compare(store: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What a daemon did between two samples, a second; and how it stands now."""
    interval_s = now["at_s"] - before["at_s"]
    hits, misses = _grown(before, now, "hits"), _grown(before, now, "misses")
    counters = _grown(before, now, "counters")
    asked = sum(hits.values()) + sum(misses.values())
    asked_ever = sum(now["hits"].values()) + sum(now["misses"].values())
    return {
        "store": store,
        "version": now["version"],
        "pid": now["pid"],
        "uptime_s": now["uptime_s"],
        "interval_s": interval_s,
        "tiers": {
            tier: {
                "blocks": now[tier]["blocks"],
                "used_bytes": now[tier]["used_bytes"],
                "capacity_bytes": now[tier]["capacity_bytes"],
            }
            for tier in ("ram", "nvme")
            if now[tier]
        },
        "asked_blocks_per_s": asked / interval_s,
        "hit_rate": {tier: count / asked for tier, count in hits.items()} if asked else None,
        "hit_rate_ever": (
            {tier: count / asked_ever for tier, count in now["hits"].items()}
            if asked_ever
            else None
        ),
        "misses": {reason: count for reason, count in misses.items() if count},
        "misses_ever": {reason: count for reason, count in now["misses"].items() if count},
        "bytes_per_s": {
            name: counters.get(counter, 0) / interval_s for name, counter in FLOWS.items()
        },
        "queues": now["queues"],
        "sessions": now["sessions"],
    }


def _grown(before: Mapping[str, Any], now: Mapping[str, Any], group: str) -> dict[str, int]:
    return {name: count - before[group].get(name, 0) for name, count in now[group].items()}


def _watch(looks: Callable[[float], dict[str, Any]], interval_s: float) -> None:
    from rich.live import Live

    from kvstore.cli.console import out
    from kvstore.cli.top_screen import draw

    with (
        suppress(KeyboardInterrupt),
        _keys() as pressed,
        Live(draw(looks(0.05)), console=out, screen=True, auto_refresh=False) as live,
    ):
        while pressed(interval_s) not in ("q", "Q"):
            live.update(draw(looks(0.0)), refresh=True)


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Waits for a key, as long as told; "" when none came. The terminal is left as it was."""
    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)

    def pressed(timeout_s: float) -> str:
        ready, _, _ = select.select([stdin], [], [], timeout_s)
        return os.read(stdin, 1).decode(errors="replace") if ready else ""

    try:
        tty.setcbreak(stdin)
        yield pressed
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)

"""`kvstore evict` and `retain`: which blocks a store drops, and which it keeps how firmly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from kvstore.cli.options import json_option
from kvstore.cli.prompt import NAMING_KEYS
from kvstore.cli.selection import BATCH_BLOCKS, Selection, batches, parts, selection_options
from kvstore.cli.target import WHICH, Opened, Place, opened, place_options
from kvstore.errors import InputError
from kvstore.quantities import counted, format_time, parse_time

if TYPE_CHECKING:
    from kvstore.hashing import Key
    from kvstore.inventory import Inventory
    from kvstore.retention import Retained, Retention
    from kvstore.settings import Settings

MAX_TIME_S = 100 * 365 * 86_400.0


@click.command(
    short_help="Drop the blocks of a namespace or a prompt.",
    help=f"""Drop the blocks of a namespace or of a prompt from every tier.

    Blocks that other prompts begin with as well are dropped all the same. A block that is
    being read just now stays in RAM until it has to make room.

    {WHICH}

    \b
    kvstore evict --namespace 3f2a ~/.cache/kvstore/blocks
    kvstore evict --prompt "Why is the sky blue?" --chat --model smollm2
    """,
)
@place_options(*NAMING_KEYS)
@selection_options
@json_option
def evict(place: Place, settings: Settings, selection: Selection, as_json: bool) -> None:
    from kvstore.cli.console import print_json, show
    from kvstore.cli.listing import Listing
    from kvstore.frame import names

    _check(selection)
    with opened(place, settings) as store:
        if selection.chain is None:
            chosen = selection.of(Listing.of(store.inventory)).held.rows
            count = evict_all(store.inventory, names(chosen["key"]))
        else:
            count = sum(store.store.evict(part) for part in reversed(parts(selection.chain)))
        _check_connected(store)
    if as_json:
        print_json({"store": str(place), "blocks": count})
    else:
        show(f"{counted(count, 'block')} dropped\n")


@click.command(
    short_help="Keep blocks more firmly, or less.",
    help=f"""Set how firmly the blocks of a namespace or of a prompt are kept.

    Where room is needed, the lowest priority goes first; 35 is everyone's. With --ttl it
    falls back to that after so long unused. What one namespace may hold above 35 is bounded
    (store.protected_bytes): beyond, it is refused, and the exit status is 1.

    {WHICH}

    \b
    kvstore retain --namespace 3f2a --priority 80 --ttl 8h
    kvstore retain --prompt - --model smollm2 --priority 100 < system-prompt.txt
    """,
)
@click.option(
    "--priority", type=click.IntRange(0, 100), required=True, metavar="0-100", help="How firmly."
)
@click.option("--ttl", metavar="TIME", help="For how long after the last use; without it for good.")
@place_options(*NAMING_KEYS)
@selection_options
@json_option
def retain(
    priority: int,
    ttl: str | None,
    place: Place,
    settings: Settings,
    selection: Selection,
    as_json: bool,
) -> int:
    from kvstore.cli.console import print_json, show
    from kvstore.cli.listing import Listing
    from kvstore.retention import Retained, Retention

    _check(selection)
    retention = Retention(priority, None if ttl is None else time_option("--ttl", ttl))
    total = Retained(0, 0, 0, 0, retention.priority, retention.ttl_s)
    with opened(place, settings) as store:
        if selection.chain is None:
            chains = list(batches(selection.of(Listing.of(store.inventory))))
        else:
            chains = parts(selection.chain)
        for chain in chains:
            done = store.store.retain(chain, retention)
            total = done._replace(
                accepted=total.accepted + done.accepted,
                clipped=total.clipped + done.clipped,
                refused=total.refused + done.refused,
                absent=total.absent + done.absent,
            )
        _check_connected(store)
    if as_json:
        print_json({"store": str(place), **total._asdict()})
    else:
        blocks = counted(total.accepted + total.clipped, "block")
        show(f"{blocks} at priority {_granted(total, retention)}\n")
        if total.refused:
            show(
                f"{total.refused} refused: the namespace may hold no more above the default "
                "priority (store.protected_bytes)\n"
            )
    return 1 if total.refused else 0


def _granted(total: Retained, asked: Retention) -> str:
    """The priority, and where it and the time fall short of what was asked."""
    text = str(total.priority)
    if total.priority < asked.priority:
        text += ", the tenant's cap"
    if total.ttl_s is not None and asked.ttl_s is not None and total.ttl_s < asked.ttl_s:
        text += f", for {format_time(total.ttl_s)} at most"
    return text


def evict_all(inventory: Inventory, keys: Sequence[Key]) -> int:
    """Drop blocks, the last of them first, a batch at a time; returns how many were held."""
    count = 0
    for stop in range(len(keys), 0, -BATCH_BLOCKS):
        count += inventory.evict(keys[max(0, stop - BATCH_BLOCKS) : stop])
    return count


def time_option(flag: str, text: str) -> float:
    """Seconds, more than none. Raises InputError."""
    try:
        seconds = parse_time(text)
    except ValueError as error:
        raise InputError(f"{flag} {text!r}: {error}") from None
    if not 0 < seconds <= MAX_TIME_S:
        raise InputError(f"{flag} {text!r}: must be more than none, and at most a century")
    return seconds


def _check_connected(store: Opened) -> None:
    """What a daemon that is away was asked, it has not done."""
    if store.client is not None:
        store.client.check_connected()


def _check(selection: Selection) -> None:
    if selection.is_all:
        raise InputError("which blocks? give --namespace, or --prompt and --model")

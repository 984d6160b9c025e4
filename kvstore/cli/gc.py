"""`kvstore gc`: drop what is damaged, what nobody has used for long, what is of no use any more."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING

import click

from kvstore.cli.keep import evict_all, time_option
from kvstore.cli.options import json_option
from kvstore.cli.target import WHICH, Place, opened, place_options
from kvstore.quantities import counted, format_size

if TYPE_CHECKING:
    from kvstore.cli.listing import Listing
    from kvstore.hashing import Key
    from kvstore.settings import Settings


@click.command(
    short_help="Drop damaged records, and blocks that are damaged, old or of no use.",
    help=f"""Drop damaged records of a directory (a daemon has done so when it started).

    A record says where a block is; the block's own bytes are not looked at. With flags
    also blocks: those of the namespaces and models named, and of these, or of all, those
    that `verify` finds wrong, and that were not used for so long. A block that is being
    read just now stays.

    {WHICH}

    \b
    kvstore gc ~/.cache/kvstore/blocks
    kvstore gc --damaged ~/.cache/kvstore/blocks
    kvstore gc --older-than 7d --dry-run
    kvstore gc --model SmolLM2-135M-Instruct --store unix:///run/kvstore/kvstore.sock
    """,
)
@click.option("--namespace", multiple=True, metavar="HEX", help="Of this one; repeatable.")
@click.option("--model", multiple=True, metavar="NAME", help="As `ls` names it; repeatable.")
@click.option("--older-than", metavar="TIME", help="Not used for so long, such as 7d.")
@click.option("--damaged", is_flag=True, help="That `verify DIR` finds wrong: every byte is read.")
@click.option("--dry-run", is_flag=True, help="Say what would be dropped, and drop nothing.")
@place_options()
@json_option
def gc(
    namespace: tuple[str, ...],
    model: tuple[str, ...],
    older_than: str | None,
    damaged: bool,
    dry_run: bool,
    place: Place,
    settings: Settings,
    as_json: bool,
) -> None:
    from kvstore.cli.console import print_json, show
    from kvstore.cli.ls import read
    from kvstore.frame import names

    age_s = None if older_than is None else time_option("--older-than", older_than)
    records = _damaged_records(place)
    wrong = _damaged_blocks(place) if damaged else None
    listing = read(place, settings)
    chosen = choose(listing, namespace, model, age_s, time.time(), wrong)
    rows = chosen.held.rows
    count, nbytes = len(rows), int(rows["raw_bytes"].sum())
    if not dry_run and (count or records):
        with opened(place, settings) as store:  # a directory's damaged records go as it is opened
            count = evict_all(store.inventory, names(rows["key"]))
    if as_json:
        print_json(
            {
                "store": str(place),
                "damaged_records": records,
                "blocks": count,
                "raw_bytes": nbytes,
                "dry_run": dry_run,
            }
        )
        return
    would = "would be dropped" if dry_run else "dropped"
    blocks = f"{counted(count, 'block')} ({format_size(nbytes)})"
    show(f"{counted(records, 'damaged record')} and {blocks} {would}\n")


def choose(
    listing: Listing,
    namespaces: tuple[str, ...],
    models: tuple[str, ...],
    age_s: float | None,
    now_s: float,
    damaged: Collection[Key] | None = None,
) -> Listing:
    """The blocks that are to go: none where nothing is asked for. `damaged`: of these alone.

    Raises InputError for a namespace or model that is not there.
    """
    from kvstore.cli.listing import keyed, named
    from kvstore.errors import InputError
    from kvstore.frame import names

    if not namespaces and not models and age_s is None and damaged is None:
        return keyed(listing, set())
    fingerprints = listing.fingerprints()
    wanted = {named(prefix, fingerprints) for prefix in namespaces}
    for model in models:
        theirs = {name for name in fingerprints if listing.model(name) == model}
        if not theirs:
            known = sorted({each.model for each in listing.namespaces.values()})
            there = ", ".join(map(repr, known)) or "none"
            raise InputError(f"--model {model}: no namespace is of it; models here: {there}")
        wanted |= theirs
    chosen = listing.only(wanted) if namespaces or models else listing
    if damaged is not None:
        chosen = keyed(chosen, damaged)
    if age_s is None:
        return chosen
    rows = chosen.held.rows
    return keyed(chosen, set(names(rows["key"][rows["last_use_s"] < now_s - age_s])))


def _damaged_blocks(place: Place) -> set[Key]:
    """Those in which `verify` finds something wrong."""
    from kvstore.cli.console import progress
    from kvstore.errors import InputError
    from kvstore.tiers.nvme_verify import verify

    if place.url is not None:
        raise InputError(
            "--damaged is for a directory; `kvstore verify` of a daemon drops what it finds"
        )
    keys: set[Key] = set()
    with progress(f"Reading {place}") as report:
        for step in verify(place.path):
            keys.update(finding.key for finding in step.findings if finding.key)
            report(step.stored_bytes, step.stored_bytes_total)
    return keys


def _damaged_records(place: Place) -> int:
    """Records of a directory that name no block, or one that cannot be there."""
    from kvstore.tiers.nvme_verify import damaged_records

    return 0 if place.url is not None else damaged_records(place.path)

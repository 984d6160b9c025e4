"""`kvstore ls`: namespaces, chains and blocks, of a directory or of a running daemon."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.options import json_option
from kvstore.cli.target import WHICH, Place, place_options
from kvstore.quantities import format_size

if TYPE_CHECKING:
    from kvstore.cli.listing import Listing
    from kvstore.settings import Settings


@click.command(
    short_help="List namespaces, chains or blocks.",
    help=f"""List what a store holds: namespaces, or with a flag their chains or blocks.

    A namespace is what blocks must have in common to be of use to each other: model,
    weights, block size, tenant. A chain is all that begins with one first block: prompts
    that share it are one chain. Chains and blocks come the latest used first.

    {WHICH}

    \b
    kvstore ls ~/.cache/kvstore/blocks
    kvstore ls --chains --store unix:///run/kvstore/kvstore.sock
    kvstore ls --blocks --namespace 3f2a --json | jq '.blocks | length'
    """,
)
@click.option("--chains", "what", flag_value="chains", help="Chains: heads, lengths, bytes.")
@click.option("--blocks", "what", flag_value="blocks", help="Every single block.")
@click.option("--namespace", metavar="HEX", help="Only of this one: how its name begins.")
@place_options()
@json_option
def ls(
    what: str | None, namespace: str | None, place: Place, settings: Settings, as_json: bool
) -> None:
    from kvstore.cli.console import print_json
    from kvstore.cli.listing import by_block, by_chain, by_namespace, named

    listing = read(place, settings)
    if namespace is not None:
        listing = listing.only({named(namespace, listing.fingerprints())})
    if as_json:
        sort = what or "namespaces"
        listed = {"chains": by_chain, "blocks": by_block}.get(sort, by_namespace)(listing)
        print_json({"store": str(place), sort: list(listed)})
    elif what == "chains":
        _show_chains(by_chain(listing))
    elif what == "blocks":
        _show_blocks(listing)
    else:
        show_namespaces(by_namespace(listing))


def read(place: Place, settings: Settings) -> Listing:
    """A directory is looked into without changing a byte of it."""
    from kvstore.cli.listing import Listing
    from kvstore.cli.target import opened
    from kvstore.tiers.nvme_verify import read_directory

    if place.url is None:
        return Listing.of_directory(read_directory(place.path))
    with opened(place, settings) as store:
        return Listing.of(store.inventory)


def show_namespaces(summaries: list[dict[str, Any]]) -> None:
    """One a line: its name, blocks, tokens and size, when last used, and whose it is."""
    from kvstore.cli.console import show, shown

    show(f"{'namespace':32}  {'blocks':>9}  {'tokens':>9}  {'size':>9}  {'last use':19}  model\n")
    for each in summaries:
        known = each["namespace"]
        model = f"{shown(known['model'])}, {known['kv_dtype']}" if known else "unknown"
        salted = ", salted" if known and known["salt"] else ""
        tokens = "" if each["tokens"] is None else each["tokens"]
        show(
            f"{each['fingerprint']}  {each['blocks']:>9}  {tokens:>9}  "
            f"{format_size(each['raw_bytes']):>9}  {moment(each['last_use_s']):19}  "
            f"{model}{salted}\n"
        )


def moment(seconds: float) -> str:
    """Date and time of day, for people."""
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


def _show_chains(chains: list[dict[str, Any]]) -> None:
    from kvstore.cli.console import show, shown

    show(f"{'head':32}  {'blocks':>9}  {'longest':>9}  {'size':>9}  {'last use':19}  model\n")
    for chain in chains:
        # Nothing finds its way to a chain whose first blocks have gone, until they are back.
        cut = "" if chain["starts_a_prompt"] else " (what comes before is not held)"
        show(
            f"{chain['head']}  {chain['blocks']:>9}  {chain['length']:>9}  "
            f"{format_size(chain['raw_bytes']):>9}  {moment(chain['last_use_s']):19}  "
            f"{shown(chain['model'] or 'unknown')}{cut}\n"
        )


def _show_blocks(listing: Listing) -> None:
    from kvstore.cli.console import show, shown
    from kvstore.cli.listing import by_block

    show(
        f"{'key':32}  {'size':>9}  {'codec':5}  {'prio':>4}  {'last use':19}  {'tiers':8}  model\n"
    )
    for block in by_block(listing):
        show(
            f"{block['key']}  {format_size(block['stored_bytes']):>9}  {block['codec']:5}  "
            f"{block['priority']:>4}  {moment(block['last_use_s']):19}  "
            f"{','.join(block['tiers']):8}  {shown(block['model'] or 'unknown')}\n"
        )

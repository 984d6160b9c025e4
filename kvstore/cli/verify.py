"""`kvstore verify`: every checksum of a directory, or of the blocks that a daemon has on NVMe."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from kvstore.cli.options import json_option
from kvstore.cli.target import WHICH, Place, opened, place_options
from kvstore.quantities import counted, format_size

if TYPE_CHECKING:
    from kvstore.inventory import Inventory
    from kvstore.settings import Settings

SHOWN_FINDINGS = 20  # for a person
STEP_BLOCKS, STEP_BYTES = 256, 32 << 20  # that a daemon checks before it answers


class Step(NamedTuple):
    """How far it is, and what has been found since the last step: as `--json` shows it."""

    blocks: int
    stored_bytes: int
    stored_bytes_total: int
    findings: list[dict[str, Any]]


@click.command(
    short_help="Compare every block with its checksum.",
    help=f"""Check every record and every checksum of a directory. Changes nothing.

    `kvstore gc --damaged DIR` drops what is wrong.

    Or, while it serves, every block that a daemon has on NVMe, at no more than 256 MiB/s:
    what is damaged is dropped, as it would be when asked for. Exits with status 1 when
    something is wrong: a damaged block is a miss, and is computed again; the others are
    served.

    {WHICH}

    \b
    kvstore verify ~/.cache/kvstore/blocks
    kvstore verify --store unix:///run/kvstore/kvstore.sock --json
    """,
)
@place_options()
@json_option
def verify(place: Place, settings: Settings, as_json: bool) -> int:
    from kvstore.cli.console import print_json, progress, show

    findings: list[dict[str, Any]] = []
    steps = _of_directory(place) if place.url is None else _of_daemon(place, settings)
    step = Step(0, 0, 0, [])
    with progress(f"Reading {place}") as report:
        for step in steps:
            findings += step.findings
            report(step.stored_bytes, step.stored_bytes_total)
    if as_json:
        print_json(
            {
                "store": str(place),
                "blocks": step.blocks,
                "stored_bytes": step.stored_bytes,
                "findings": findings,
                "ok": not findings,
            }
        )
    else:
        _show(step, findings)
        if findings and place.url is None:
            show(f"`kvstore gc --damaged {shlex.quote(str(place))}` drops them\n")
    return 1 if findings else 0


def _of_directory(place: Place) -> Iterator[Step]:
    from kvstore.tiers import nvme_verify

    for done in nvme_verify.verify(place.path):
        findings = [
            {
                "offset": finding.offset,
                "key": finding.key.hex() if finding.key else None,
                "problem": finding.problem,
            }
            for finding in done.findings
        ]
        yield Step(done.blocks, done.stored_bytes, done.stored_bytes_total, findings)


def _of_daemon(place: Place, settings: Settings) -> Iterator[Step]:
    with opened(place, settings) as store:
        yield from check(store.inventory)


def check(inventory: Inventory) -> Iterator[Step]:
    """What a store in use has on NVMe now, in the order in which it lies there."""
    from kvstore.frame import names
    from kvstore.inventory import listing

    if "nvme" not in inventory.tiers():
        return
    rows = listing(inventory, "nvme")
    rows = rows[rows["offset"].argsort(kind="stable")]
    keys, sizes = names(rows["key"]), rows["stored_bytes"].tolist()
    offsets = dict(zip(keys, rows["offset"].tolist(), strict=True))
    blocks = nbytes = start = 0
    while start < len(keys):
        stop, step_bytes = start + 1, sizes[start]
        while stop < min(len(keys), start + STEP_BLOCKS) and step_bytes < STEP_BYTES:
            step_bytes += sizes[stop]
            stop += 1
        checked = inventory.check(keys[start:stop])
        blocks, nbytes, start = blocks + checked.blocks, nbytes + checked.stored_bytes, stop
        findings = [
            {
                "offset": offsets[key],
                "key": key.hex(),
                "problem": "the stored bytes do not match their checksum; the block was dropped",
            }
            for key in checked.damaged
        ]
        yield Step(blocks, nbytes, sum(sizes), findings)


def _show(step: Step, findings: list[dict[str, Any]]) -> None:
    from kvstore.cli.console import show

    for finding in findings[:SHOWN_FINDINGS]:
        show(
            f"{finding['key'] or 'unknown block'} at offset {finding['offset']}: "
            f"{finding['problem']}\n"
        )
    if len(findings) > SHOWN_FINDINGS:
        show(f"and {len(findings) - SHOWN_FINDINGS} more; --json has them all\n")
    verdict = f"problems: {len(findings)}" if findings else "all is well"
    show(f"{counted(step.blocks, 'block')}, {format_size(step.stored_bytes)} read: {verdict}\n")

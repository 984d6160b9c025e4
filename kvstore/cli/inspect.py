"""`kvstore ls`, `stat` and `verify`: what an NVMe directory holds, while nobody uses it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.options import json_option, settings_options
from kvstore.errors import InputError
from kvstore.quantities import format_size

if TYPE_CHECKING:
    from kvstore.settings import Settings
    from kvstore.tiers.nvme_verify import DirectorySummary, Finding, NamespaceSummary

SHOWN_FINDINGS = 20  # by `verify`, for a person

directory_argument = click.argument(
    "directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path, readable=False)
)


@click.command(short_help="List the blocks of an NVMe directory.")
@directory_argument
@settings_options()
@json_option
def ls(directory: Path | None, settings: Settings, as_json: bool) -> None:
    """List the blocks of an NVMe directory, the latest used first.

    DIR is the setting nvme.path unless given. No other process may be using it.

    \b
    kvstore ls ~/.cache/kvstore/blocks | head
    kvstore ls --json | jq '.blocks | length'
    """
    from kvstore.cli.console import print_json, show
    from kvstore.tiers.nvme_verify import read_directory

    summary = read_directory(_chosen(directory, settings))
    if as_json:
        print_json({"path": str(summary.path), "blocks": list(_blocks(summary))})
        return
    show(f"{'key':32}  {'size':>9}  {'codec':5}  {'prio':>4}  {'last use':19}  model\n")
    for block in _blocks(summary):
        used = datetime.fromtimestamp(block["last_use_s"]).isoformat(" ", "seconds")
        size = format_size(block["stored_bytes"])
        line = f"{block['key']}  {size:>9}  {block['codec']:5}  {block['priority']:>4}  {used}"
        show(f"{line}  {block['model'] or 'unknown'}\n")


@click.command(short_help="Sum up an NVMe directory.")
@directory_argument
@settings_options()
@json_option
def stat(directory: Path | None, settings: Settings, as_json: bool) -> None:
    """Sum up an NVMe directory: its size, its blocks, and whose they are.

    DIR is the setting nvme.path unless given. No other process may be using it.

    \b
    kvstore stat ~/.cache/kvstore/blocks
    kvstore stat --json
    """
    from kvstore.cli.console import print_json, show
    from kvstore.tiers.nvme_verify import read_directory

    summary = read_directory(_chosen(directory, settings))
    if as_json:
        print_json(
            {
                "path": str(summary.path),
                "blocks": summary.blocks,
                "stored_bytes": summary.stored_bytes,
                "slab_bytes": summary.slab_bytes,
                "allocated_bytes": summary.allocated_bytes,
                "damaged_records": summary.damaged_records,
                "cut_off_blocks": summary.cut_off_blocks,
                "namespaces": [_namespace(each) for each in summary.namespaces],
            }
        )
        return
    show(
        f"{summary.path}\n"
        f"{summary.blocks} blocks, {format_size(summary.stored_bytes)} "
        f"of {format_size(summary.slab_bytes)}; {format_size(summary.allocated_bytes)} on disk\n"
    )
    if summary.damaged_records:
        show(f"{summary.damaged_records} damaged records; `kvstore verify` says more\n")
    if summary.cut_off_blocks:
        show(
            f"the slab is shorter than its records say, by {summary.cut_off_blocks} blocks; "
            "`kvstore verify` says more\n"
        )
    for each in summary.namespaces:
        known = each.namespace
        model = f"{known.model}, {known.kv_dtype}" if known else "unknown model"
        tokens = f"{known.block_tokens * each.blocks} tokens, " if known else ""
        show(
            f"{each.fingerprint.hex()}  {each.blocks} blocks, {tokens}"
            f"{format_size(each.stored_bytes)}: {model}\n"
        )


@click.command(short_help="Check every byte of an NVMe directory.")
@directory_argument
@settings_options()
@json_option
def verify(directory: Path | None, settings: Settings, as_json: bool) -> int:
    """Check every record and every checksum of an NVMe directory. Changes nothing.

    DIR is the setting nvme.path unless given. No other process may be using it.
    Exits with status 1 when something is wrong: a damaged block is a miss, and
    is computed again; the others are served.

    \b
    kvstore verify ~/.cache/kvstore/blocks
    kvstore verify --json
    """
    from kvstore.cli.console import print_json, progress, show
    from kvstore.tiers import nvme_verify

    path = _chosen(directory, settings)
    findings: list[Finding] = []
    with progress(f"Reading {path}") as report:
        for step in nvme_verify.verify(path):
            findings += step.findings
            report(step.stored_bytes, step.stored_bytes_total)
    if as_json:
        print_json(
            {
                "path": str(path),
                "blocks": step.blocks,
                "stored_bytes": step.stored_bytes,
                "findings": [
                    {
                        "offset": f.offset,
                        "key": f.key.hex() if f.key else None,
                        "problem": f.problem,
                    }
                    for f in findings
                ],
                "ok": not findings,
            }
        )
    else:
        for finding in findings[:SHOWN_FINDINGS]:
            key = finding.key.hex() if finding.key else "unknown block"
            show(f"{key} at offset {finding.offset}: {finding.problem}\n")
        if len(findings) > SHOWN_FINDINGS:
            show(f"and {len(findings) - SHOWN_FINDINGS} more; --json has them all\n")
        verdict = f"problems: {len(findings)}" if findings else "all is well"
        show(f"{step.blocks} blocks, {format_size(step.stored_bytes)} read: {verdict}\n")
    return 1 if findings else 0


def _chosen(directory: Path | None, settings: Settings) -> Path:
    chosen = directory or settings.nvme.path
    if chosen is None:
        raise InputError("which directory? give DIR, or set nvme.path")
    return chosen


def _blocks(summary: DirectorySummary) -> Iterator[dict[str, Any]]:
    """Every sound block as data, the latest used first."""
    from kvstore.frame import CODEC_NUMBERS

    codecs = {number: name for name, number in CODEC_NUMBERS.items()}
    models = {
        each.fingerprint: each.namespace.model for each in summary.namespaces if each.namespace
    }
    records = summary.records
    for place in records["last_use_s"].argsort(kind="stable")[::-1]:
        record = records[place]
        fingerprint = record["namespace"].item()
        yield {
            "key": record["key"].item().hex(),
            "parent": record["parent"].item().hex(),
            "namespace": fingerprint.hex(),
            "model": models.get(fingerprint),
            "offset": int(record["offset"]),
            "codec": codecs[int(record["codec"])],
            "raw_bytes": int(record["raw_bytes"]),
            "stored_bytes": int(record["stored_bytes"]),
            "priority": int(record["priority"]),
            "created_s": float(record["created_s"]),
            "last_use_s": float(record["last_use_s"]),
            "expires_s": float(record["expires_s"]),
        }


def _namespace(summary: NamespaceSummary) -> dict[str, Any]:
    """Whose blocks these are, as data."""
    import dataclasses

    return {
        "fingerprint": summary.fingerprint.hex(),
        "blocks": summary.blocks,
        "raw_bytes": summary.raw_bytes,
        "stored_bytes": summary.stored_bytes,
        "namespace": dataclasses.asdict(summary.namespace) if summary.namespace else None,
    }

"""`kvstore bench`: what the hardware gives, and what of it arrives."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from kvstore.cli.options import json_option

PIPED_COLUMNS = 140  # of a table that goes to a file


@click.group(short_help="Measure, beside what the hardware gives.")
def bench() -> None:
    """Measure kvstore beside what the hardware under it gives.

    What needs no GPU is measured by `make bench` in a clone.

    \b
    kvstore bench gpu
    """


@bench.command(short_help="Copies, attention, engine and tiers on a GPU.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--device", default="cuda", show_default=True, help="The GPU: cuda, or cuda:1.")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default="/var/tmp",
    show_default=True,
    help="On the NVMe drive to measure; 12 GiB are used, and given back.",
)
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that all of it runs, not how fast.")
@json_option
def gpu(names: tuple[str, ...], device: str, directory: Path, quick: bool, as_json: bool) -> int:
    """Measure what a GPU does, each figure beside its ceiling in the same run.

    Copies of pages to pinned RAM and back; decode attention; decoding, beside such
    copies, and with and without offload; the time to the first token of a long prompt from
    RAM and from NVMe; sessions served. A model of Llama-3.1-8B's shape with random
    weights, 16-token blocks. Planned to take less than 8 minutes on an H100 with 64 GB of
    RAM free: nothing is begun after 5 and a half. What there is no time or no room for is listed
    as not measured.

    NAME is one of copies, attention, decode, prompts, sessions, or one part of it;
    without any all are measured. What is measured is said on stderr as it comes; with --json the
    table goes there too. Exits with status 1 when a bound is missed, something broke, or nothing
    measured has a bound, with 2 where there is no GPU. With --quick there are no bounds: status 0
    says that nothing broke.

    \b
    kvstore bench gpu
    kvstore bench gpu --json > gpu.json
    kvstore bench gpu copies attention/fp8
    """
    from rich.console import Console

    from kvstore.cli.console import err, out, print_json, tell
    from kvstore.cli.running import engine_extra

    with engine_extra():
        from kvstore.bench import report
        from kvstore.bench.benchmark import Bench, measured
        from kvstore.bench.card import cuda_card
        from kvstore.bench.gpu import catalogue, facts, select
        from kvstore.bench.rows import Row, Unmeasured
        from kvstore.bench.sizes import FULL, TINY
    sizes = TINY if quick else FULL
    chosen = select(catalogue(sizes), names)
    card = cuda_card(device)
    rows: list[Row] = []
    unmeasured: list[Unmeasured] = []
    tell(", ".join(f"{key} {value}" for key, value in card.facts().items()))
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=directory) as scratch:
        run = Bench(card, sizes, Path(scratch))
        number = iter(range(1, len(chosen) + 1))
        for each in measured(chosen, run, lambda name: tell(f"{next(number)}. {name}")):
            if isinstance(each, Row):
                each = each.unjudged() if quick else each
                rows.append(each)
            else:
                unmeasured.append(each)
            tell(f"   {report.line(each)}")
        about = {"effort": "quick" if quick else "full", **facts(run)}
    results = report.document(rows, unmeasured, about)
    if quick:
        results["ok"] = not report.went_wrong(rows, unmeasured)
    console = err if as_json else out
    width = console.width if console.is_terminal else PIPED_COLUMNS
    report.print_table(rows, unmeasured, Console(width=width, stderr=as_json))
    if as_json:
        print_json(results)
    return 0 if results["ok"] else 1

"""`python -m benchmarks [NAME...]`: measure, print the table, write the results down."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import machine, plots
from benchmarks.catalogue import CATALOGUE, select
from benchmarks.harness import FULL, QUICK, Bench, outcome
from kvstore.bench import report
from kvstore.bench.rows import Row, Unmeasured

PIPED_COLUMNS = 140  # of a table that goes to a file
RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 when every bound is kept, 1 when one is missed or a
    benchmark broke, 2 for a wrong name."""
    given = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else PIPED_COLUMNS)
    if given.list:
        for benchmark in CATALOGUE:
            console.print(benchmark.name, highlight=False)
        return 0
    try:
        chosen = select(given.names)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    effort = QUICK if given.quick else FULL
    run = {"effort": "quick" if given.quick else "full", "machine": machine.facts(given.dir)}
    rows: list[Row] = []
    unmeasured: list[Unmeasured] = []
    for benchmark in chosen:
        with (
            tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=given.dir) as directory,
            console.status(f"measuring {benchmark.name}"),
        ):
            measured = outcome(benchmark, Bench(effort, Path(directory)))
        if isinstance(measured, Unmeasured):
            unmeasured.append(measured)
        else:
            rows.extend(measured)
    report.print_table(rows, unmeasured, console)
    results = report.document(rows, unmeasured, run)
    # What is left out of a run must not look as if it had been measured.
    is_whole = effort is FULL and len(chosen) == len(CATALOGUE)
    output: Path = given.output if is_whole else given.output / "partial"
    report.write(results, output / "latest.json")
    plots.draw(rows, output)
    return 1 if report.went_wrong(rows, unmeasured) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="names or groups, * allowed; all without one")
    parser.add_argument("--list", action="store_true", help="list the names and stop")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that it works, not how fast"
    )
    parser.add_argument(
        "--dir", type=Path, default=Path("/var/tmp"), help="on the disk to measure (%(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        help="folder of the results; what is no full run goes to partial/ in it",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

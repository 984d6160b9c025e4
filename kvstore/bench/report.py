"""The rows as a table for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvstore.bench.rows import Row, Unmeasured

FORMAT = 1


def went_wrong(rows: Sequence[Row], unmeasured: Sequence[Unmeasured]) -> bool:
    """Whether a bound was missed or something broke."""
    missed = any(row.ok is False for row in rows)
    return missed or any(each.outcome == "failed" for each in unmeasured)


def document(
    rows: Sequence[Row], unmeasured: Sequence[Unmeasured], run: Mapping[str, Any]
) -> dict[str, Any]:
    """What is written down. `ok`: every row that has a bound keeps it, there is one, and
    nothing failed.

    `run` says what was run how, and on what machine.
    """
    judged = [row.ok for row in rows if row.ok is not None]
    return {
        "format": FORMAT,
        **run,
        "ok": bool(judged) and not went_wrong(rows, unmeasured),
        "judged": len(judged),
        "rows": [row.to_json() for row in rows],
        "unmeasured": [each.to_json() for each in unmeasured],
    }


def write(results: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def line(each: Row | Unmeasured) -> str:
    """One result, for who watches."""
    if isinstance(each, Unmeasured):
        return f"{_OUTCOMES[each.outcome][1]} {each.name}: {each.reason}"
    parts = [f"{_short(each.value)} {each.unit}"]
    if each.ceiling is not None and each.ratio is not None:
        parts.append(f"{each.ratio:.3f} of {_short(each.ceiling)}, {each.against}")
    if each.ok is not None:
        parts.append(f"{_bound(each)}: {_WORDS[each.ok]}")
    if each.note:
        parts.append(each.note)
    return f"{each.name}: {'; '.join(parts)}"


def print_table(rows: Sequence[Row], unmeasured: Sequence[Unmeasured], console: Console) -> None:
    table = Table("figure", title_justify="left")
    for heading in ("value", "ceiling", "ratio", "bound"):
        table.add_column(heading, justify="right")
    table.add_column("", justify="center")
    table.add_column("against", style="dim")
    group = ""
    for row in rows:
        if group and row.group != group:
            table.add_section()
        group = row.group
        table.add_row(
            row.name,
            f"{_short(row.value)} {row.unit}",
            "" if row.ceiling is None else _short(row.ceiling),
            "" if row.ratio is None else f"{row.ratio:.3f}",
            _bound(row),
            _MARKS[row.ok],
            row.against,
        )
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"[dim]{escape(row.name)}: {escape(row.note)}[/]", highlight=False)
    for each in unmeasured:
        colour, word = _OUTCOMES[each.outcome]
        said = f"[{colour}]{word}[/] {each.name}: {escape(each.reason)}"
        console.print(said, highlight=False, soft_wrap=True)
    failed = [row.name for row in rows if row.ok is False]
    judged = sum(row.ok is not None for row in rows)
    kept = f"{judged - len(failed)} of {judged} bounds kept" if judged else "nothing was judged"
    console.print(kept, highlight=False)


_OUTCOMES = {"skipped": ("yellow", "not measured"), "failed": ("bold red", "failed")}
_WORDS = {True: "ok", False: "misses"}
_MARKS = {True: f"[green]{_WORDS[True]}[/]", False: f"[bold red]{_WORDS[False]}[/]", None: ""}


def _bound(row: Row) -> str:
    if row.at_least is not None:
        return f"≥ {row.at_least:g}"
    return "" if row.at_most is None else f"≤ {row.at_most:g}"


def _short(value: float) -> str:
    """Three significant figures, and no exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

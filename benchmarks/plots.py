"""Two pictures of the results: bandwidth beside its ceiling, time to first token by source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.bench.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, THEIRS = "#2a6f97", "#c9d6df"


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write bandwidth.svg and ttft.svg, each if there are rows for it; returns what was written."""
    moved = [row for row in rows if row.unit == "GB/s" and row.ceiling is not None]
    waited = [row for row in rows if row.group == "ttft"]
    written = []
    if moved:
        written.append(_draw_bandwidth(moved, folder / "bandwidth.svg"))
    if waited:
        written.append(_draw_ttft(waited, folder / "ttft.svg"))
    return written


def _draw_bandwidth(rows: Sequence[Row], path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.42 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    ceilings = [row.ceiling or 0.0 for row in rows]
    axes.barh(places, ceilings, height=0.8, color=THEIRS, label="measured beside it")
    axes.barh(places, [row.value for row in rows], height=0.4, color=OURS, label="kvstore")
    for place, row in zip(places, rows, strict=True):
        longest = max(row.value, row.ceiling or 0.0)
        axes.text(longest, place, f" {row.ratio:.2f}", va="center", fontsize=8)
    _finish(axes, [row.name for row in rows], "GB/s")
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path)
    return path


def _draw_ttft(rows: Sequence[Row], path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.0), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [row.value for row in rows], height=0.6, color=OURS)
    for place, row in zip(places, rows, strict=True):
        part = "" if row.ratio is None else f" ({row.ratio:.3f} of computed)"
        axes.text(row.value, place, f" {row.value:,.0f} ms{part}", va="center", fontsize=8)
    axes.set_xlim(right=1.3 * max(row.value for row in rows))
    _finish(axes, [row.name for row in rows], "ms")
    figure.savefig(path)
    return path


def _finish(axes: Axes, names: Sequence[str], unit: str) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)

"""`kvstore demo`: what it is good for, shown with a real model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.options import FLAGS, json_option
from kvstore.quantities import format_time

if TYPE_CHECKING:
    from kvstore.cli.demo_runs import Run


@click.command(short_help="Show what it does, with a real model.")
@click.option("--model", default="smollm2", show_default=True, metavar="MODEL", help="Who answers.")
@click.option("--threads", metavar=FLAGS["engine.threads"][1], help=FLAGS["engine.threads"][2])
@json_option
def demo(model: str, threads: str | None, as_json: bool) -> int:
    """Ask a model questions about a long document, cold and from every tier.

    The document is kvstore's handbook, the model SmolLM2-135M (98 MB, fetched
    once). Each question is asked with nothing known, then with the prompt's KV
    in HBM, in RAM after HBM was cleared, and on NVMe in a new process. Exits with
    status 1 unless every answer is the same, token for token, and the tokens
    from all tiers add up.

    \b
    kvstore demo
    kvstore demo --json > demo.json
    """
    from kvstore import sources
    from kvstore.cli.console import print_json, tell
    from kvstore.cli.demo_runs import PLACES, run_all
    from kvstore.cli.running import model_path, set_threads

    given = {} if threads is None else {"engine.threads": sources.Given(threads, "--threads")}
    set_threads(sources.load(given))
    path = model_path(model)
    with tempfile.TemporaryDirectory(prefix="kvstore-demo-") as folder:
        runs = run_all(
            path,
            Path(folder) / "blocks",
            lambda place, question: tell(f"{question} ({PLACES[place]})"),
        )
    report = summarise(runs)
    if as_json:
        print_json({"model": path.name, **report})
    else:
        print_report(report)
    return 0 if report["ok"] else 1


def summarise(runs: list[Run]) -> dict[str, Any]:
    """Runs as data, with what is to be judged about them."""
    from kvstore.cli.demo_runs import COLD, PLACES

    cold = {run.question: run for run in runs if run.place == COLD}
    ttft_s = {place: median(run.ttft_s for run in runs if run.place == place) for place in PLACES}
    rows = [
        {
            "question": run.question,
            "place": run.place,
            "answer": run.text,
            "finish_reason": run.finish_reason,
            "token_ids": run.token_ids,
            "ttft_s": run.ttft_s,
            "prompt_tokens": run.prompt_tokens,
            "hbm": run.hbm,
            "ram": run.ram,
            "nvme": run.nvme,
            "recomputed": run.recomputed,
            "adds_up": run.adds_up,
            "identical": run.token_ids == cold[run.question].token_ids,
        }
        for run in runs
    ]
    ok = all(row["identical"] and row["adds_up"] for row in rows)
    return {"runs": rows, "median_ttft_s": ttft_s, "ok": ok}


def print_report(report: dict[str, Any]) -> None:
    """The answers, the table, and what it says in words."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from kvstore.cli.console import out
    from kvstore.cli.demo_runs import COLD, HBM, NVME, PLACES, RAM

    table = Table("", "tiers", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("TTFT", "hbm", "ram", "nvme", "recomputed", "prompt", "identical"):
        table.add_column(name, justify="right")
    questions = dict.fromkeys(row["question"] for row in report["runs"])
    for number, question in enumerate(questions, start=1):
        rows = [row for row in report["runs"] if row["question"] == question]
        out.print(f"{number}. {question}", style="bold", highlight=False)
        cut = " ..." if rows[0]["finish_reason"] == "length" else ""
        out.print(rows[0]["answer"] + cut, markup=False, highlight=False)
        for row in rows:
            table.add_row(
                str(number) if row is rows[0] else "",
                PLACES[row["place"]],
                format_time(row["ttft_s"]),
                *(str(row[name]) for name in ("hbm", "ram", "nvme", "recomputed")),
                str(row["prompt_tokens"]) if row["adds_up"] else f"{row['prompt_tokens']} (!)",
                "yes" if row["identical"] else "NO",
                end_section=row is rows[-1],
            )
    out.print(table)
    if not report["ok"]:
        out.print("Not all answers are the same, or the tokens do not add up.", style="bold red")
        return
    cold, *warm = (report["median_ttft_s"][place] for place in (COLD, HBM, RAM, NVME))
    sooner = ", ".join(
        f"{cold / ttft_s:.0f} times sooner from {name}"
        for ttft_s, name in zip(warm, ("HBM", "RAM", "NVMe in a new process"), strict=True)
    )
    out.print(f"Every answer is the same, token for token. The first token came {sooner}.")

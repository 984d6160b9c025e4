"""What a person sees: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

out = Console()
err = Console(stderr=True)

NAME_CHARACTERS = 80

Report = Callable[[int, int], None]  # (done, total)


@contextmanager
def progress(label: str) -> Iterator[Report]:
    """A bar on stderr while the body runs; nothing where stderr is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def show(text: str) -> None:
    """A piece of a result, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def shown(name: str) -> str:
    """A name that a client has chosen, short, and without what a terminal would obey."""
    text = "".join(letter if letter.isprintable() else "?" for letter in name)
    return text if len(text) <= NAME_CHARACTERS else text[: NAME_CHARACTERS - 3] + "..."


def tell(text: str) -> None:
    """A line on stderr, whoever reads it: a program's log shows what it is busy with."""
    err.print(Text(text, style="dim"), soft_wrap=True)


def note(text: str) -> None:
    """A dim line on stderr, only for a person who is looking."""
    if err.is_terminal:
        err.print(Text(text, style="dim"))

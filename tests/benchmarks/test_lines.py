"""Turns taken in another process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.workers.lines import Worker, WorkerError

PYTHON = Path(sys.executable)
ECHO = "tests.benchmarks.echo_worker"


def test_a_worker_answers_line_by_line_whatever_it_prints() -> None:
    with Worker(PYTHON, ECHO, "a", 2) as worker:
        assert worker.ask("arguments") == ["a", "2"]
        assert worker.ask("echo", text="line\nbreak") == "line\nbreak"
        assert worker.turn("half", seconds=3)() == 1.5


def test_what_goes_wrong_there_is_said_here() -> None:
    with Worker(PYTHON, ECHO) as worker:
        with pytest.raises(WorkerError, match="divide: ZeroDivisionError: division by zero"):
            worker.ask("divide")
        assert worker.ask("arguments") == []
        with pytest.raises(WorkerError, match="died with status 3"):
            worker.ask("die")

"""What the commands tell OpenMP, before torch is imported and reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import environment

COMMANDS = (("generate", "hello"), ("chat",), ("demo",))
NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def told(home: Path, *args: str, **given: str) -> tuple[str | None, ...]:
    """The variables as torch would find them, after a command that got as far as its model."""
    code = (
        "import json, os, sys\n"
        "from kvstore.cli.main import run\n"
        "assert run([*sys.argv[1:], '--model', 'nowhere']) == 2\n"
        "assert 'torch' not in sys.modules\n"
        f"print(json.dumps([os.environ.get(name) for name in {NAMES}]))\n"
    )
    env = {k: v for k, v in environment(home).items() if k not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=home,
        env={**env, **given},
        check=False,
    )
    assert b"there is no model at nowhere" in done.stderr
    return tuple(json.loads(done.stdout))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_threads_that_wait_soon_sleep(home: Path, command: tuple[str, ...]) -> None:
    assert told(home, *command, "--threads", "2") == ("1000", None, "2")


def test_what_the_user_says_stays(home: Path) -> None:
    assert told(home, "generate", "hi", GOMP_SPINCOUNT="7") == ("7", None, None)
    assert told(home, "generate", "hi", OMP_WAIT_POLICY="active") == (None, "active", None)

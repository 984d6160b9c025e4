"""The example, as a reader without a GPU would run it: it tries the server's settings, twice."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.engines.conftest import ROOT

pytestmark = pytest.mark.engines


def test_pages_are_there_the_second_time(
    sglang_python: Path, sglang_environment: dict[str, str], model_folder: Path, tmp_path: Path
) -> None:
    example = ROOT / "examples" / "sglang_server.py"
    command = [sglang_python, example, model_folder, tmp_path / "cache", "--check"]
    said = []
    for _ in range(2):
        done = subprocess.run(
            list(map(str, command)),
            env={**os.environ, **sglang_environment, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said.append(done.stdout.splitlines()[-1])
    assert said == [
        "0 of 4 pages were there, 4 are, 4 were loaded",
        "4 of 4 pages were there, 4 are, 4 were loaded",
    ]

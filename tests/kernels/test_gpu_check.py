"""`make gpu-check` runs every tool, fails with the first that fails, and says what is missing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "gpu_check.sh"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder of programs: what it is like on a machine that has everything."""
    for name in ("python", "compute-sanitizer"):
        program(tmp_path, name, f'echo "{name} $*" >> {tmp_path}/said')
    return tmp_path


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def check(machine: Path) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{machine}:{os.defpath}", "CUDA_HOME": str(machine / "none")}
    command = ["bash", str(SCRIPT), str(machine / "python")]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_all_tools_run_over_the_tests_that_need_a_gpu(machine: Path) -> None:
    done = check(machine)
    assert done.returncode == 0, done.stderr
    said = (machine / "said").read_text().splitlines()
    runs = [line.split() for line in said if line.startswith("compute-sanitizer")]
    assert [line[line.index("--tool") + 1] for line in runs] == [
        "memcheck",
        "racecheck",
        "synccheck",
    ]
    for line in runs:
        assert "--error-exitcode" in line
        assert line[line.index("-m", line.index("pytest")) + 1] == "gpu"
        assert line[-1] == "tests/kernels"


def test_a_tool_that_finds_something_fails_the_check(machine: Path) -> None:
    program(machine, "compute-sanitizer", 'test "$2" != racecheck')
    done = check(machine)
    assert done.returncode == 1
    assert done.stdout.splitlines() == ["gpu-check: memcheck", "gpu-check: racecheck"]


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("exit 1", "finds no CUDA device"),
        ('case "$2" in *cupy*) exit 1; esac', "pip install -e '.[engine,cuda13]'"),
    ],
)
def test_what_python_lacks_is_said(machine: Path, python: str, message: str) -> None:
    program(machine, "python", python)
    done = check(machine)
    assert done.returncode == 2
    assert message in done.stderr


def test_that_there_is_no_sanitizer_is_said(machine: Path) -> None:
    (machine / "compute-sanitizer").unlink()
    done = check(machine)
    assert done.returncode == 2
    assert "no compute-sanitizer" in done.stderr

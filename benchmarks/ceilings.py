"""What the hardware gives: memory through memcpy, a disk through fio."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from benchmarks.harness import Workload
from kvstore.bench.rows import NotHereError
from kvstore.bench.turns import Turn

Pattern = Literal["randread", "randwrite"]


class Engine(NamedTuple):
    """How fio drives the disk."""

    name: str
    depth: int


ENGINES = (
    Engine("psync", 1),
    *(Engine("io_uring", depth) for depth in (2, 4, 8, 16, 32)),
)


class Fio:
    """fio over one file, every block of a workload once, in random order."""

    def __init__(self, file: Path, workload: Workload) -> None:
        """Lays the file out with random bytes. Raises NotHereError where there is no fio."""
        if shutil.which("fio") is None:
            raise NotHereError("fio is not installed (Debian: apt-get install fio)")
        self._file = file
        self._workload = workload
        generator = np.random.default_rng(0)
        with file.open("wb") as out:
            for _ in range(workload.count):
                out.write(generator.bytes(workload.block_bytes))
        self.direct = takes_o_direct(file)

    def turn(self, pattern: Pattern, engine: Engine) -> Turn:
        """One pass over the file; its seconds are those that fio counted itself."""

        def run() -> float:
            side = "read" if pattern == "randread" else "write"
            counted = _fio(self._command(pattern, engine))["jobs"][0][side]
            return max(counted["runtime"], 1.0) / 1000  # fio counts whole milliseconds

        return run

    def best(self, pattern: Pattern, engines: Sequence[Engine] = ENGINES) -> Engine:
        """The fastest of `engines`, each tried twice."""
        self.turn(pattern, engines[0])()
        tries = {engine: self.turn(pattern, engine) for engine in engines if _runs(engine)}
        seconds = {engine: min(turn(), turn()) for engine, turn in tries.items()}
        return min(seconds, key=lambda engine: seconds[engine])

    def describe(self, engine: Engine) -> str:
        mode = "O_DIRECT" if self.direct else "buffered: O_DIRECT is refused here"
        return f"fio {engine.name} qd {engine.depth}, {mode}"

    def _command(self, pattern: Pattern, engine: Engine) -> list[str]:
        return [
            "fio",
            "--name=ceiling",
            f"--filename={self._file}",
            f"--rw={pattern}",
            f"--bs={self._workload.block_bytes}",
            f"--size={self._workload.total_bytes}",
            f"--ioengine={engine.name}",
            f"--iodepth={engine.depth}",
            f"--direct={int(self.direct)}",
            "--randrepeat=0",
            "--output-format=json",
        ]


@cache
def _runs(engine: Engine) -> bool:
    """Whether this fio and this kernel have the engine; containers often refuse io_uring."""
    probe = ["fio", "--name=probe", "--filename=/dev/zero", "--rw=read", "--bs=4k"]
    command = [*probe, "--size=4k", f"--ioengine={engine.name}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _fio(command: list[str]) -> dict[str, list[dict[str, dict[str, float]]]]:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # fio puts warnings before the report even when it is asked for JSON.
    report = done.stdout[done.stdout.index("{") :]
    parsed: dict[str, list[dict[str, dict[str, float]]]] = json.loads(report)
    return parsed


def takes_o_direct(file: Path) -> bool:
    """Whether the file system lets `file` be opened past the page cache (tmpfs does not)."""
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True

"""Runs workers, and kills them in the middle of what they say they are doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.kill.workload import Orders

ROOT = Path(__file__).parents[2]
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}


class Aim(NamedTuple):
    """Kill `spin_s` after `what` has begun for the `nth` time; "" is whatever begins."""

    what: str
    nth: int
    spin_s: float


class Answer(NamedTuple):
    number: int  # of the prompt
    tokens: tuple[int, ...]
    sources: tuple[int, ...]  # prompt tokens from hbm, ram, nvme, remote, and recomputed


@dataclass
class Run:
    """What one worker said, until it ended."""

    pid: int = 0
    status: int = 0
    answers: list[Answer] = field(default_factory=list)
    blocks: dict[bytes, str] = field(default_factory=dict)  # key -> sha256
    memory: set[int] = field(default_factory=set)  # inodes
    in_flight: Counter[str] = field(default_factory=Counter)  # begun, and not ended

    def hear(self, words: list[str]) -> None:
        match words:
            case ["pid", pid]:
                self.pid = int(pid)
            case ["begin", what]:
                self.in_flight[what] += 1
            case ["end", what]:
                self.in_flight[what] -= 1
            case ["answer", number, tokens, sources]:
                self.answers.append(Answer(int(number), _numbers(tokens), _numbers(sources)))
            case ["block", key, digest]:
                self.blocks[bytes.fromhex(key)] = digest
            case ["memory", inode]:
                self.memory.add(int(inode))
            case ["ended", status]:
                self.status = int(status)
            case _:
                raise AssertionError(f"the worker said {words}")


class Workers:
    """One process with torch in it, which forks the workers; one of them at a time."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.kill.worker"],
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def reference(self) -> Run:
        return self._run("reference", None)

    def run(self, orders: Orders, aim: Aim | None = None) -> Run:
        """Until the worker has answered all, or is hit."""
        return self._run(orders.to_json(), aim)

    def _run(self, order: str, aim: Aim | None) -> Run:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(order + "\n")
        run, begun = Run(), 0
        for line in self._server.stdout:
            words = line.split()
            run.hear(words)
            if words[0] == "ended":
                run.in_flight = +run.in_flight
                return run
            if aim is not None and words[0] == "begin" and aim.what in ("", words[1]):
                begun += 1
                if begun == aim.nth:
                    spin(aim.spin_s)
                    os.kill(run.pid, signal.SIGKILL)
        raise AssertionError("the process that forks the workers has ended")

    def close(self) -> None:
        """Let the process end; kill it where it does not."""
        with self._server as server:
            assert server.stdin is not None
            server.stdin.close()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def spin(seconds: float) -> None:
    """Wait more precisely than a timer can: at most a few milliseconds."""
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        pass


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))

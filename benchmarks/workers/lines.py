"""One JSON line asks, one JSON line answers: how a turn runs in another process.

The side that serves imports nothing but the standard library, because it runs
in the environments of the peers.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]


class WorkerError(Exception):
    """A worker died, or said that what it was asked failed."""


class Worker:
    """A process that runs `module` with `python` and answers lines until it is closed."""

    def __init__(
        self, python: Path, module: str, *arguments: object, env: Mapping[str, str] | None = None
    ) -> None:
        """`arguments` reach the module as `sys.argv`. `env` is added to ours."""
        self._module = module
        self._process = subprocess.Popen(
            [str(python), "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if "KVSTORE_BENCH_STDERR" not in os.environ else None,
            text=True,
        )

    def ask(self, verb: str, **arguments: Any) -> Any:
        """What the worker's `verb` returned; blocks until it has."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([verb, arguments]) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"{self._module} died with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self._module}, {verb}: {answer['error']}")
        return answer["result"]

    def turn(self, verb: str, **arguments: Any) -> Callable[[], float]:
        """A turn that the worker takes and times itself."""
        return lambda: float(self.ask(verb, **arguments))

    def close(self) -> None:
        """Ends the process; it is killed if it does not end by itself."""
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def serve(build: Callable[[], Mapping[str, Callable[..., Any]]]) -> None:
    """Answer lines with the verbs that `build` returns until the asking side hangs up.

    What libraries print goes to stderr, so that it cannot be taken for an answer.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    verbs: Mapping[str, Callable[..., Any]] = {}
    for line in sys.stdin:
        verb, arguments = json.loads(line)
        try:
            verbs = verbs or build()
            answer = {"result": verbs[verb](**arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    # A peer's threads that do not end by themselves must not keep us.
    os._exit(0)

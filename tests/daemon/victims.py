"""Starts client processes, hears what they say, and kills them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import TracebackType
from typing import Self

from tests.kill.victims import ONE_THREAD, ROOT, spin


class Clients:
    """One process that forks clients of a daemon, one of them at a time."""

    def __init__(self, module: str = "tests.daemon.victim") -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env={**os.environ, **ONE_THREAD},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._pid = 0

    def start(self, url: str, seed: int, operations: int, state: str = "work") -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(f"{url} {seed} {operations} {state}\n")
        self._pid = int(self._hear("pid"))

    def kill_in(self, state: str, spin_s: float) -> None:
        """Wait until the client is in the state, and some more; then kill it."""
        self._hear(state)
        spin(spin_s)
        os.kill(self._pid, signal.SIGKILL)
        assert self.ended() == -signal.SIGKILL

    def ended(self) -> int:
        """The exit status of the client; waits for it."""
        return int(self._hear("ended"))

    def close(self) -> None:
        with self._server as server:
            assert server.stdin is not None
            server.stdin.close()

    def _hear(self, what: str) -> str:
        """The rest of the next line, which must begin with `what`."""
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        word, _, rest = line.strip().partition(" ")
        assert word == what, f"the client said {line!r}"
        return rest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

"""The plain driver: a few threads with preadv and pwritev. Runs wherever Python does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait

from kvstore.tiers.driver import Done, Op, Request

THREADS = 8  # blocking calls in flight; a drive wants several, more gained nothing


class ThreadDriver:
    """See `Driver`. The system calls release the GIL, so the requests overlap."""

    name = "threads"

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kvstore-io")

    def run(self, op: Op, fd: int, requests: Sequence[Request], done: Done) -> None:
        move = _read if op is Op.READ else _write
        numbers = {
            self._threads.submit(move, fd, request): number
            for number, request in enumerate(requests)
        }
        try:
            for future in as_completed(numbers):
                done(numbers[future], future.result())
        finally:
            wait(numbers)

    def close(self) -> None:
        self._threads.shutdown()


def _read(fd: int, request: Request) -> int:
    try:
        return os.preadv(fd, request.buffers, request.offset)
    except OSError as error:
        return -(error.errno or 0)


def _write(fd: int, request: Request) -> int:
    try:
        return os.pwritev(fd, request.buffers, request.offset)
    except OSError as error:
        return -(error.errno or 0)

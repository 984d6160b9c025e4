"""How bytes move between memory and a file: what a driver is, and which one to take.

Two drivers do the same work: io_uring where the kernel allows it, threads with
preadv and pwritev everywhere else (docs/adr/0010).
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

log = logging.getLogger(__name__)

DriverName = Literal["auto", "uring", "threads"]

Done = Callable[[int, int], None]
"""Called with the number of a request, and the bytes moved or minus the errno."""


class Op(enum.Enum):
    READ = "read"
    WRITE = "write"


class Request(NamedTuple):
    """One contiguous run of a file, and the buffers that it is read into or written from.

    At most 1,024 buffers (IOV_MAX). They belong to the caller, and must not be
    touched or freed before `run` has returned. `addresses` is where they lie.
    """

    offset: int
    buffers: Sequence[memoryview]
    addresses: Sequence[int]


class Driver(Protocol):
    """Moves many requests at once. Any thread may call `run`, several at a time."""

    @property
    def name(self) -> str: ...

    def run(self, op: Op, fd: int, requests: Sequence[Request], done: Done) -> None:
        """Start all requests, call `done` for each as it completes, return when all have.

        Blocks. `done` runs in the calling thread while other requests are in
        flight; when it raises, the rest is waited for and its error goes on.
        A short result is not retried. OSError when the requests could not be
        started; none is in flight then.
        """
        ...

    def close(self) -> None:
        """Give back rings and threads. Nothing may be running."""
        ...


def address(buffer: memoryview) -> int:
    """Where a contiguous buffer lies in memory; read-only buffers too."""
    where: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return where


def open_driver(name: DriverName) -> Driver:
    """The driver called `name`; for "auto" io_uring, or threads where it is refused.

    Raises OSError when io_uring was asked for by name and is refused.
    """
    from kvstore.tiers.threadio import ThreadDriver
    from kvstore.tiers.uring import UringDriver

    if name == "threads":
        return ThreadDriver()
    try:
        return UringDriver()
    except OSError as error:
        if name == "uring":
            raise
        log.info("io_uring is refused here (%s): NVMe I/O runs on threads", error.strerror)
        return ThreadDriver()

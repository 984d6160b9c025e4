"""The leak check itself: each kind of thing is seen while it is held, and not after."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from tests.leaks import Held, leaks


@contextmanager
def file() -> Iterator[None]:
    with Path(__file__).open():
        yield


@contextmanager
def thread() -> Iterator[None]:
    end = threading.Event()
    worker = threading.Thread(target=end.wait, name="worker")
    worker.start()
    yield
    end.set()
    worker.join()


@contextmanager
def task() -> Iterator[None]:
    loop = asyncio.new_event_loop()
    pending = loop.create_task(asyncio.Event().wait(), name="pending")
    yield
    pending.cancel()
    with suppress(asyncio.CancelledError):
        loop.run_until_complete(pending)
    loop.close()


@contextmanager
def memory() -> Iterator[None]:
    fd = os.memfd_create("kvstore-test")
    os.ftruncate(fd, mmap.PAGESIZE)
    mapping = mmap.mmap(fd, mmap.PAGESIZE)
    os.close(fd)
    yield
    mapping.close()


@contextmanager
def process() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE):
        yield


@pytest.mark.parametrize(
    ("hold", "words"),
    [
        (file, "test_leaks.py"),
        (thread, "thread worker"),
        (task, "task pending"),
        (task, "open event loop"),
        (memory, "/memfd:kvstore-test"),
        (process, "process"),
    ],
)
def test_what_is_held_is_seen_until_it_is_let_go(
    hold: Callable[[], AbstractContextManager[None]], words: str
) -> None:
    before = Held.now()
    with hold():
        assert any(words in line for line in Held.now().since(before))
    assert leaks(before) == []


def test_garbage_that_nobody_has_collected_yet_is_no_leak() -> None:
    before = Held.now()
    gc.disable()
    try:
        with os.fdopen(os.memfd_create("kvstore-test"), "r+b") as backing:
            backing.truncate(mmap.PAGESIZE)
            cycle: list[object] = [mmap.mmap(backing.fileno(), mmap.PAGESIZE)]
        cycle.append(cycle)
        del cycle
        assert Held.now().since(before) != []
        assert leaks(before) == []
    finally:
        gc.enable()

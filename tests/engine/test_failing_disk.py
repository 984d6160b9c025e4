"""A disk that is full, read-only or unreadable, in earnest: the kernel refuses, the engine goes on.

Files are swapped beneath the open descriptors, so that every refusal is the kernel's own.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import kvstore
from kvstore.engine.loading import LoadedModel
from kvstore.engine.sampling import SamplingParams
from kvstore.store import BlockStore
from tests.engine.reference import GREEDY, LONG, PROMPTS, check, engine_over, sources

Fault = Callable[[Path, ExitStack], None]


def swap(path: Path, target: str | Path, flags: int) -> None:
    """Let every descriptor of this process on `path` be one on `target`."""
    swapped = 0
    for name in os.listdir("/proc/self/fd"):
        if os.path.realpath(f"/proc/self/fd/{name}") == str(path.resolve()):
            fd = os.open(target, flags | os.O_CLOEXEC)
            os.dup2(fd, int(name), inheritable=False)
            os.close(fd)
            swapped += 1
    assert swapped


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """No write of this process goes beyond the first `nbytes` of a file (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full(folder: Path, undo: ExitStack) -> None:
    swap(folder / "slab", "/dev/full", os.O_RDWR)


def records_full(folder: Path, undo: ExitStack) -> None:
    swap(folder / "records.mdb", "/dev/full", os.O_RDWR)


def read_only(folder: Path, undo: ExitStack) -> None:
    for name in ("slab", "records.mdb"):
        swap(folder / name, folder / name, os.O_RDONLY)


def unreadable(folder: Path, undo: ExitStack) -> None:
    swap(folder / "slab", folder / "slab", os.O_WRONLY)


def limited(folder: Path, undo: ExitStack) -> None:
    """Blocks at the front of the slab can still be written; the records, and others, cannot."""
    undo.enter_context(largest_file(80 << 10))


@pytest.fixture
def filled(tiny: LoadedModel, tmp_path: Path) -> Path:
    """An NVMe directory that holds the blocks of LONG."""
    with store_on(tmp_path / "nvme") as store, engine_over(tiny, store) as engine:
        engine.generate([LONG], SamplingParams(max_tokens=1))
    return tmp_path / "nvme"


def store_on(folder: Path) -> BlockStore:
    return kvstore.open(ram_bytes="4 MiB", nvme_path=folder, nvme_bytes="16 MiB")


@pytest.mark.parametrize(
    ("fault", "why", "nvme_tokens"),
    [
        (full, "enospc", 0),  # and what is read are zeros
        (records_full, "records", 48),
        (read_only, "ebadf", 48),
        (limited, "efbig", 48),
        (unreadable, None, 0),
    ],
)
def test_the_engine_goes_on(
    tiny: LoadedModel,
    expected: list[tuple[int, ...]],
    filled: Path,
    fault: Fault,
    why: str | None,
    nvme_tokens: int,
) -> None:
    with ExitStack() as undo:
        store = undo.enter_context(store_on(filled))
        engine = undo.enter_context(engine_over(tiny, store))
        fault(filled, undo)
        outputs = engine.generate(PROMPTS, GREEDY)
        check(outputs, expected)
        assert outputs[0].usage.nvme_tokens == nvme_tokens
        store.flush()
        engine.clear_hbm()
        again = engine.generate(PROMPTS, GREEDY)
        check(again, expected)
        assert sources(again[0].usage) == (0, 48, 0, 0, 2)  # RAM goes on
        stats = store.stats()
        assert stats.nvme["read_only"] is (why is not None)
        if why is not None:
            assert stats.nvme[f"failures_{why}"] > 0
            refused = sum(n for name, n in stats.counters.items() if "refused" in name)
            assert refused > 0
    with store_on(filled) as store, engine_over(tiny, store) as engine:
        outputs = engine.generate(PROMPTS, GREEDY)
        check(outputs, expected)
        assert not store.stats().nvme["read_only"]
        if fault is not full:  # which cost the blocks that could not be read
            assert outputs[0].usage.nvme_tokens == 48

"""What a test may leave behind: nothing. Linux only, read from /proc."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import threading
from asyncio.base_events import BaseEventLoop
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

# What libraries open once and keep for the life of the process.
KEPT_FILES = ("/dev/null", "/dev/urandom", "/dev/nvidia", "/proc/")
KEPT_THREADS = ("tqdm_monitor",)
KEPT_PROCESSES = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
# The last field of a line of /proc/self/maps, of which there can be thousands.
MAPPED_MEMORY = re.compile(r" (/(?:memfd:|dev/shm/).*)")
JOIN_S = 5.0  # how long a thread that was told to end may take to do so

_loops: WeakSet[BaseEventLoop] = WeakSet()


def watch_event_loops() -> None:
    """From now on know every event loop that is made, in whatever thread."""
    original = BaseEventLoop.__init__

    def init(self: BaseEventLoop, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _loops.add(self)

    BaseEventLoop.__init__ = init  # type: ignore[method-assign, assignment]


class Held(NamedTuple):
    """Everything that this process holds now."""

    files: Counter[str]
    threads: frozenset[threading.Thread]
    tasks: frozenset[str]
    loops: frozenset[int]
    memory: frozenset[str]
    processes: frozenset[int]

    @classmethod
    def now(cls) -> Held:
        loops = [loop for loop in list(_loops) if not loop.is_closed()]
        tasks = (task for loop in list(_loops) for task in asyncio.all_tasks(loop))
        return cls(
            files=_files(),
            threads=frozenset(t for t in threading.enumerate() if t.name not in KEPT_THREADS),
            tasks=frozenset(f"{task.get_name()}: {task.get_coro()!r}" for task in tasks),
            loops=frozenset(id(loop) for loop in loops),
            memory=_shared_memory(),
            processes=_children(),
        )

    def since(self, before: Held) -> list[str]:
        """What is held now and was not held before, in words."""
        files = (f"file {path} ({n})" for path, n in (self.files - before.files).items())
        threads = (f"thread {thread.name}" for thread in self.threads - before.threads)
        tasks = (f"task {task}" for task in self.tasks - before.tasks)
        loops = (f"open event loop {loop:#x}" for loop in self.loops - before.loops)
        memory = (f"shared memory {name}" for name in self.memory - before.memory)
        processes = (f"process {pid}: {_command(pid)}" for pid in self.processes - before.processes)
        return sorted([*files, *threads, *tasks, *loops, *memory, *processes])


def leaks(before: Held) -> list[str]:
    """What has been left behind since `before`; empty when all is well.

    Collecting garbage is slow once torch is loaded, so it is done on suspicion only.
    """
    now = Held.now()
    if not now.since(before):
        return []
    gc.collect()
    for thread in now.threads - before.threads:
        thread.join(JOIN_S)
    return Held.now().since(before)


def _files() -> Counter[str]:
    targets: Counter[str] = Counter()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:  # the descriptor of this very listing
            continue
        if not target.startswith(KEPT_FILES):
            targets[_without_number(target)] += 1
    return targets


def _without_number(target: str) -> str:
    """`socket:[123]` as `socket`: a file that was closed and opened again is no leak."""
    kind, bracket, _ = target.partition(":[")
    return kind if bracket else target


def _shared_memory() -> frozenset[str]:
    """Mapped memfds, by inode, and named segments of ours."""
    maps = Path("/proc/self/maps").read_text()
    mapped = set()
    for path in MAPPED_MEMORY.finditer(maps):
        line_start = maps.rfind("\n", 0, path.start()) + 1
        inode = maps[line_start : path.start()].split()[-1]
        mapped.add(f"{path[1]} inode {inode}")
    # Other programs use this folder at the same time: only our names count.
    named = (name for name in os.listdir("/dev/shm") if name.startswith("kvstore"))
    return frozenset(mapped.union(named))


def _children() -> frozenset[int]:
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            pids.update(map(int, (task / "children").read_text().split()))
        except (FileNotFoundError, ProcessLookupError):  # that thread has ended
            continue
    return frozenset(p for p in pids if not any(kept in _command(p) for kept in KEPT_PROCESSES))


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip() or "(zombie)"
    except (FileNotFoundError, ProcessLookupError):
        return "(ended)"

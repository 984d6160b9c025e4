"""What this machine has: memory and disk, in bytes."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def home_folder(variable: str, default: str) -> Path | None:
    """The folder that an XDG variable names, or else `default`, such as "~/.cache".

    None where that needs a home directory and there is none: a user without an
    entry in the password file, as containers have them.
    """
    folder = os.path.expanduser(os.environ.get(variable) or default)
    return None if folder.startswith("~") else Path(folder)


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or less where a container says so."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(physical, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return physical


def free_disk_bytes(directory: Path) -> int:
    """What files in `directory` may grow to: free space, plus what they hold already.

    The directory need not exist yet.
    """
    existing = directory.absolute()
    while not os.path.exists(existing) and existing != existing.parent:
        existing = existing.parent
    disk = os.statvfs(existing)
    try:
        held = sum(entry.stat().st_blocks * 512 for entry in os.scandir(directory))
    except OSError:  # absent, or not ours to read: whoever opens it will say so
        held = 0
    return disk.f_bavail * disk.f_frsize + held

"""What this machine has: memory and disk, in bytes, and GPUs."""

from __future__ import annotations

import os
from pathlib import Path

SLAB, RECORDS = "slab", "records.mdb"  # the files of an NVMe directory that take its space
# Of an NVMe tier's capacity, what its other files, the directory and the file system's
# extents may take. It is never allocated.
OVERHEAD_BYTES = 64 << 10
_ROUNDING_BYTES = 4096  # the slab ends with a whole block of the file system

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


def has_gpu() -> bool:
    """Whether NVIDIA's driver is loaded, also where this process may not use it itself."""
    return any(map(os.path.exists, ("/proc/driver/nvidia", "/dev/nvidiactl")))


def free_disk_bytes(directory: Path) -> int:
    """The largest NVMe tier for which there is room: free space, plus what it holds already.

    A tier whose files are there always has room for the capacity that they were made
    for, on a full disk as well. Other files in the directory count for nothing. It need
    not exist yet.
    """
    existing = directory.absolute()
    while not os.path.exists(existing) and existing != existing.parent:
        existing = existing.parent
    disk = os.statvfs(existing)
    held = sum(_allocated_bytes(directory / name) for name in (SLAB, RECORDS))
    if held:
        held += OVERHEAD_BYTES + _ROUNDING_BYTES
    return disk.f_bavail * disk.f_frsize + held


def has_tier(directory: Path) -> bool:
    """Whether an NVMe tier was made there, which has a size that it was made for.

    One that was never finished has none: its slab is there, but empty.
    """
    try:
        slab, records = ((directory / name).stat().st_size for name in (SLAB, RECORDS))
    except OSError:
        return False
    return slab > 0 and records > 0


def _allocated_bytes(file: Path) -> int:
    try:
        return file.stat().st_blocks * 512
    except OSError:  # absent, or not ours to read: whoever opens it will say so
        return 0

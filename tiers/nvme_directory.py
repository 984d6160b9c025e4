"""The directory of an NVMe tier: its files, their sizes, and who may use it."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from kvstore.allocator import ALIGN_BYTES
from kvstore.errors import DirectoryError, SettingsError

FORMAT = 1
MIN_CAPACITY_BYTES = 1 << 20
# A record takes 140 bytes; pages are half full at worst, and two transactions' worth of
# replaced pages cannot be used again yet.
RECORD_ROOM_BYTES = 768
MAP_BASE_BYTES = 96 << 10  # what LMDB needs before the first record

_FORMAT_LINE = "kvstore nvme format "
_LEAST_MAP_BYTES = 256 << 10
_SMALL_MAP_BYTES = 16 << 20
_OVERHEAD_BYTES = 64 << 10  # the directory itself, its small files, the file system's extents


class Sizes(NamedTuple):
    """How a capacity is divided, so that the whole directory stays within it."""

    slab_bytes: int
    map_bytes: int

    @property
    def max_blocks(self) -> int:
        """Records for which the LMDB map has room whatever the order of writes."""
        return (self.map_bytes - MAP_BASE_BYTES) // RECORD_ROOM_BYTES

    @classmethod
    def of(cls, capacity_bytes: int) -> Sizes:
        """Raises SettingsError when the capacity is too small for anything.

        Records get 1/64, enough for blocks of 48 KiB; a small tier, in which
        blocks are likely to be small, gives an eighth or more.
        """
        if capacity_bytes < MIN_CAPACITY_BYTES:
            raise SettingsError(
                f"an NVMe tier of {capacity_bytes} bytes is too small; it needs at least 1 MiB"
            )
        small = max(_LEAST_MAP_BYTES, min(capacity_bytes // 8, _SMALL_MAP_BYTES))
        map_bytes = max(capacity_bytes // 64, small)
        map_bytes = map_bytes // ALIGN_BYTES * ALIGN_BYTES
        slab_bytes = (capacity_bytes - map_bytes - _OVERHEAD_BYTES) // ALIGN_BYTES * ALIGN_BYTES
        return cls(slab_bytes, map_bytes)


class Directory:
    """An NVMe directory, locked for this process until closed. A context manager."""

    def __init__(self, path: Path, *, create: bool) -> None:
        """Lock the directory; `create` what is missing.

        Raises DirectoryError when it may not be read (or, with `create`, written),
        is in use, is of a newer format, or is not an NVMe directory at all.
        """
        self.path = path
        self._lock_fd = -1
        try:
            if create:
                path.mkdir(parents=True, exist_ok=True)
            self._lock(create)
            self._check_format(create)
        except OSError as error:
            self.close()
            raise DirectoryError(self._explain(error)) from error
        except DirectoryError:
            self.close()
            raise

    @property
    def slab(self) -> Path:
        return self.path / "slab"

    @property
    def records(self) -> Path:
        return self.path / "records.mdb"

    def allocated_bytes(self) -> int:
        """What the files here occupy on the disk now."""
        return sum(entry.stat().st_blocks * 512 for entry in os.scandir(self.path))

    def room_bytes(self) -> int:
        """What the files here may grow to: what they occupy, and what is free on the disk."""
        disk = os.statvfs(self.path)
        return self.allocated_bytes() + disk.f_bavail * disk.f_frsize

    def too_large(self, capacity_bytes: int) -> SettingsError:
        return SettingsError(
            f"an NVMe tier of {capacity_bytes / 2**30:.2f} GiB does not fit on the disk of "
            f"{self.path}, where {self.room_bytes() / 2**30:.2f} GiB can be had; ask for less"
        )

    def sync(self) -> None:
        """Make names of files in the directory survive a power cut."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Let go of the lock. May be called twice."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> Directory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _lock(self, create: bool) -> None:
        # The kernel drops the lock with the process, however it ends: no stale locks.
        path = self.path / "lock"
        flags = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
        self._lock_fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock_fd, 32, 0).decode("ascii", "replace").strip()
            raise DirectoryError(
                f"{self.path} is in use by process {owner or 'unknown'}; "
                "give every process a directory of its own, or let them share a daemon"
            ) from None
        if create:
            os.ftruncate(self._lock_fd, 0)
            os.pwrite(self._lock_fd, b"%d\n" % os.getpid(), 0)

    def _check_format(self, create: bool) -> None:
        path = self.path / "format"
        try:
            line = path.read_text(errors="replace")
        except FileNotFoundError:
            if not create or self.slab.exists() or self.records.exists():
                raise DirectoryError(f"{self.path} is not a kvstore NVMe directory") from None
            self._write_format(path)
            return
        number = line.removeprefix(_FORMAT_LINE).strip()
        if not line.startswith(_FORMAT_LINE) or not number.isdecimal():
            raise DirectoryError(f"{self.path} is not a kvstore NVMe directory: see {path}")
        if int(number) > FORMAT:
            raise DirectoryError(
                f"{self.path} was written by a newer kvstore (format {number}, this one knows "
                f"up to {FORMAT}); upgrade kvstore, or give another directory"
            )

    def _write_format(self, path: Path) -> None:
        fresh = path.with_suffix(".new")
        with open(fresh, "w") as file:
            file.write(f"{_FORMAT_LINE}{FORMAT}\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(path)
        self.sync()

    def _explain(self, error: OSError) -> str:
        if error.errno == errno.ENOENT:
            return f"{self.path} is not a kvstore NVMe directory: {error.filename} is missing"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"no permission to use {self.path}: {error.strerror}"
        return f"{self.path} cannot be used: {error.strerror}"

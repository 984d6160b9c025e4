"""The directory of an NVMe tier: its files, their sizes, and who may use it."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from kvstore.allocator import ALIGN_BYTES
from kvstore.errors import DirectoryError, SettingsError
from kvstore.machine import OVERHEAD_BYTES, RECORDS, SLAB, free_disk_bytes
from kvstore.quantities import format_size

FORMAT = 1
MIN_CAPACITY_BYTES = 1 << 20
# A record takes 140 bytes; pages are half full at worst, and two transactions' worth of
# replaced pages cannot be used again yet.
RECORD_ROOM_BYTES = 768
MAP_BASE_BYTES = 96 << 10  # what LMDB needs before the first record

_FORMAT_LINE = "kvstore nvme format "
_LEAST_MAP_BYTES = 256 << 10
_SMALL_MAP_BYTES = 16 << 20
# What there may be in a new directory: of the file system, and of us if we were killed.
_NOT_FOREIGN = {"lost+found", "lock", "format.new"}


class Sizes(NamedTuple):
    """How a capacity is divided, so that the whole directory stays within it."""

    slab_bytes: int
    map_bytes: int

    @property
    def max_blocks(self) -> int:
        """Records for which the LMDB map has room whatever the order of writes."""
        return (self.map_bytes - MAP_BASE_BYTES) // RECORD_ROOM_BYTES

    @property
    def namespaces_bytes(self) -> int:
        """What namespaces may take of the map; the rest is the blocks' own."""
        return self.map_bytes // 8

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
        slab_bytes = (capacity_bytes - map_bytes - OVERHEAD_BYTES) // ALIGN_BYTES * ALIGN_BYTES
        return cls(slab_bytes, map_bytes)


def capacity_of(path: Path) -> int:
    """For which capacity the directory was made last, but for less than a page.

    Where a file was cut off, one that keeps all blocks.

    Raises DirectoryError for a directory that is none of ours, or is in use.
    """
    with Directory(path, create=False) as directory:
        try:
            return directory.made_for()
        except OSError as error:
            raise directory.refusal(error) from error


class Directory:
    """An NVMe directory, locked for this process until closed. A context manager."""

    def __init__(self, path: Path, *, create: bool) -> None:
        """Lock the directory; `create` what is missing.

        Raises DirectoryError when it may not be read (or, with `create`, written),
        is in use, is of a newer format, or is not an NVMe directory at all. A folder
        that holds something else is left as it was.
        """
        self.path = path
        self._lock_fd = -1
        try:
            if create:
                _make(path)
            if not self._has_format():
                self._check_new(create)
            self._lock(create)
            if create and not self._has_format():
                self._write_format()
            self._check_access(create)
        except OSError as error:
            self.close()
            raise self.refusal(error) from error
        except DirectoryError:
            self.close()
            raise

    @property
    def slab(self) -> Path:
        return self.path / SLAB

    @property
    def records(self) -> Path:
        return self.path / RECORDS

    def made_for(self) -> int:
        """See `capacity_of`. Raises OSError where one of its files is missing."""
        sizes = Sizes(self.slab.stat().st_size, self.records.stat().st_size)
        # Whole pages, as which capacities are divided: what rounding took makes no difference.
        capacity = max(sizes.slab_bytes + sizes.map_bytes + OVERHEAD_BYTES, MIN_CAPACITY_BYTES)
        while (missing := sizes.slab_bytes - Sizes.of(capacity).slab_bytes) > 0:
            capacity += missing
        return capacity

    def allocated_bytes(self) -> int:
        """What the files here occupy on the disk now."""
        return sum(entry.stat().st_blocks * 512 for entry in os.scandir(self.path))

    def room_bytes(self) -> int:
        """The largest capacity for which there is room."""
        return free_disk_bytes(self.path)

    def too_large(self, capacity_bytes: int) -> SettingsError:
        return SettingsError(
            f"an NVMe tier of {format_size(capacity_bytes)} does not fit on the disk of "
            f"{self.path}, where {format_size(self.room_bytes())} can be had; ask for less"
        )

    def refusal(self, error: OSError) -> DirectoryError:
        """Why the directory cannot be used, for a person."""
        if error.errno == errno.ENOENT:
            text = f"{self.path} is not a kvstore NVMe directory: {error.filename} is missing"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            inside = error.filename and os.path.exists(error.filename)
            which = error.filename if inside else self.path
            text = f"no permission to use {which}: {error.strerror}"
        else:
            text = f"{self.path} cannot be used: {error.strerror}"
        return DirectoryError(text)

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
                "give every process a directory of its own"
            ) from None
        if create:
            # Written over, not anew, and only a courtesy: the disk may be full.
            with suppress(OSError):
                os.pwrite(self._lock_fd, b"%-20d\n" % os.getpid(), 0)

    def _check_access(self, write: bool) -> None:
        """Before LMDB, whose errors do not tell a file that is closed to us from a damaged one."""
        for path in (self.slab, self.records):
            with suppress(FileNotFoundError):
                os.close(os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC))

    def _check_new(self, create: bool) -> None:
        """Where no format is written down, there must be nothing, and we must be asked to begin."""
        if not self.path.exists():
            raise DirectoryError(f"{self.path} does not exist")
        foreign = set(os.listdir(self.path)) - _NOT_FOREIGN
        # Whoever begins this directory at this moment writes the format first: look again.
        if not create or (foreign and not self._has_format()):
            text = f"{self.path} is not a kvstore NVMe directory"
            if create:
                example = self.path / "kvstore"
                text += f" and not empty; name a new or empty folder, such as {example}"
            raise DirectoryError(text)

    def _has_format(self) -> bool:
        """False where none is written down. Raises DirectoryError for one that is not ours."""
        path = self.path / "format"
        try:
            line = path.read_text(errors="replace")
        except FileNotFoundError:
            return False
        number = line.removeprefix(_FORMAT_LINE).strip()
        if not line.startswith(_FORMAT_LINE) or not number.isdecimal():
            raise DirectoryError(f"{self.path} is not a kvstore NVMe directory: see {path}")
        if int(number) > FORMAT:
            raise DirectoryError(
                f"{self.path} was written by a newer kvstore (format {number}, this one knows "
                f"up to {FORMAT}); upgrade kvstore, or give another directory"
            )
        return True

    def _write_format(self) -> None:
        path = self.path / "format"
        fresh = path.with_suffix(".new")
        with open(fresh, "w") as file:
            file.write(f"{_FORMAT_LINE}{FORMAT}\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(path)
        self.sync()


def _make(path: Path) -> None:
    """As `mkdir`, whose "File exists" says little of a file where the directory should be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error

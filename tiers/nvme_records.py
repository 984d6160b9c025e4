"""The records of an NVMe tier, in LMDB: which block lies in which extent of the slab.

The key is the extent's offset, so two records can never claim one offset, and
the batch that was written together lies together in the tree.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import lmdb
import numpy as np
from numpy.typing import NDArray

from kvstore.frame import Records, unpack_records
from kvstore.identity import Namespace

Durability = Literal["cache", "sync"]

_OFFSET = struct.Struct(">Q")  # big-endian: LMDB then sorts by offset
_WRITTEN = struct.Struct("<qq")  # day, bytes
_WRITTEN_KEY = b"written"

RecordError = (lmdb.Error, OSError)
"""What any method may raise when the disk or the file fails."""

FullError = lmdb.MapFullError

DamageError = (
    lmdb.BadDbiError,
    lmdb.BadTxnError,
    lmdb.BadValsizeError,
    lmdb.CorruptedError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
)
"""What LMDB raises on opening or reading a file whose pages it cannot follow."""


class Put(NamedTuple):
    offset: int
    record: bytes  # packed


class RecordFile:
    """One LMDB environment, of at most `map_bytes`, allocated at once.

    A commit is atomic and survives the process. With "cache" a power cut may
    undo the last commit but never breaks the tree: pages are flushed before the
    meta page that names them, only the meta page itself is not. "sync" flushes
    that too. Methods block; the owner lets one thread in at a time.
    """

    def __init__(self, path: Path, map_bytes: int, durability: Durability = "cache") -> None:
        """Opens or creates. Raises `RecordError`: `lmdb.Error` for a file that is not sound."""
        self.path = path
        self._fresh = path.with_suffix(".new")
        self._durability = durability
        self._fresh.unlink(missing_ok=True)  # half-made by a process that was killed
        if not path.exists():
            self._create(map_bytes)
        elif path.stat().st_size:
            # Before LMDB maps it: touching pages beyond the end of a cut-off file kills us.
            self._allocate(map_bytes)
        self._open(path, map_bytes)
        self._allocate(map_bytes)

    @classmethod
    def read_only(cls, path: Path) -> RecordFile:
        """For looking at a file that nobody is writing. Raises `RecordError`."""
        self = cls.__new__(cls)
        self.path = path
        self._env = lmdb.open(
            str(path), subdir=False, readonly=True, lock=False, create=False, max_dbs=3
        )
        try:
            pages = self._env.info()["last_pgno"] + 1
            if pages * self._env.stat()["psize"] > path.stat().st_size:
                raise lmdb.CorruptedError(f"{path.name} is cut off")
            self._open_databases(create=False)
        except BaseException:
            self._env.close()
            raise
        return self

    def _create(self, map_bytes: int) -> None:
        """LMDB takes several steps. Who is killed between them leaves no file of this name."""
        self._open(self._fresh, map_bytes)
        self._env.close()
        self._fresh.rename(self.path)

    def _open(self, path: Path, map_bytes: int) -> None:
        # No lock file: the directory is locked, and nobody reads while we write.
        self._env = lmdb.open(
            str(path),
            map_size=map_bytes,
            subdir=False,
            lock=False,
            max_dbs=3,
            metasync=self._durability == "sync",
            mode=0o600,
        )
        try:
            self._open_databases(create=True)
        except BaseException:
            self._env.close()
            raise

    def _open_databases(self, *, create: bool) -> None:
        self._records = self._env.open_db(b"records", create=create)
        self._namespaces = self._env.open_db(b"namespaces", create=create)
        self._state = self._env.open_db(b"state", create=create)

    def _allocate(self, map_bytes: int) -> None:
        """Take the disk space now: later there might be none."""
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, map_bytes)
        finally:
            os.close(fd)

    # ---- reading

    def load(self) -> tuple[NDArray[np.uint64], Records]:
        """Every record, by offset: the offset it stands under, and the record itself.

        A million take about a second.
        """
        with self._env.begin(db=self._records) as txn:
            records = unpack_records(list(txn.cursor().iternext(keys=False)))
            keys = b"".join(txn.cursor().iternext(values=False))
        if len(keys) != _OFFSET.size * len(records.rows):
            raise lmdb.CorruptedError(
                f"{self.path.name} has a record under a key of another length"
            )
        return np.frombuffer(keys, ">u8").astype(np.uint64), records

    def namespaces(self) -> dict[bytes, Namespace]:
        """By fingerprint; what is not a namespace's record, or another's, is left out."""
        found = {}
        with self._env.begin(db=self._namespaces) as txn:
            for fingerprint, text in txn.cursor():
                try:
                    namespace = Namespace.from_json(text.decode())
                except ValueError:
                    continue
                if namespace.fingerprint == fingerprint:
                    found[fingerprint] = namespace
        return found

    def written(self) -> tuple[int, int]:
        """The last day on which blocks were written, and how many bytes."""
        with self._env.begin(db=self._state) as txn:
            value = txn.get(_WRITTEN_KEY)
        if value is None or len(value) != _WRITTEN.size:
            return 0, 0
        day, nbytes = _WRITTEN.unpack(value)
        return day, nbytes

    # ---- writing; each method is one transaction

    def put(self, puts: Sequence[Put], written: tuple[int, int] | None = None) -> None:
        """Add or replace records. Raises FullError, too, and then changes nothing."""
        with self._env.begin(write=True) as txn:
            cursor = txn.cursor(self._records)
            cursor.putmulti([(_OFFSET.pack(put.offset), put.record) for put in puts])
            cursor.close()
            if written is not None:
                txn.put(_WRITTEN_KEY, _WRITTEN.pack(*written), db=self._state)

    def delete(self, offsets: Iterable[int]) -> None:
        """When this returns, the extents at these offsets may be used again."""
        with self._env.begin(write=True, db=self._records) as txn:
            for offset in offsets:
                txn.delete(_OFFSET.pack(offset))

    def remember(self, namespaces: Mapping[bytes, Namespace]) -> None:
        with self._env.begin(write=True, db=self._namespaces) as txn:
            for fingerprint, namespace in namespaces.items():
                txn.put(fingerprint, namespace.to_json().encode())

    def forget(self, fingerprints: Iterable[bytes]) -> None:
        with self._env.begin(write=True, db=self._namespaces) as txn:
            for fingerprint in fingerprints:
                txn.delete(fingerprint)

    def shrink(self, map_bytes: int) -> None:
        """Rewrite the file so that it takes no more than `map_bytes`."""
        self._env.copy(str(self._fresh), compact=True)
        self._env.close()
        self._fresh.chmod(0o600)  # as the file that it replaces: LMDB leaves it to the umask
        self._fresh.rename(self.path)
        self._open(self.path, map_bytes)
        self._allocate(map_bytes)

    def close(self) -> None:
        self._env.close()

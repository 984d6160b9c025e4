"""Looking at an NVMe directory that no process is using: what is in it, and is it sound.

Nothing here changes a byte of the slab or the records.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import lmdb
import numpy as np
from numpy.typing import NDArray

from kvstore.allocator import ALIGN_BYTES, align_up
from kvstore.errors import DirectoryError
from kvstore.frame import RECORD_DTYPE, Records, checksum, names
from kvstore.hashing import Key
from kvstore.identity import Namespace
from kvstore.tiers.nvme_directory import Directory, Sizes, capacity_of
from kvstore.tiers.nvme_records import DamageError, RecordFile
from kvstore.tiers.nvme_table import BlockTable

STEP_BYTES = 64 << 20  # checked between two reports of progress


class Finding(NamedTuple):
    """One thing that is wrong. `key` is None where the record cannot be believed."""

    offset: int
    key: Key | None
    problem: str


class Progress(NamedTuple):
    """How far `verify` is; `findings` are those since the last report."""

    blocks: int
    blocks_total: int
    stored_bytes: int
    stored_bytes_total: int
    findings: Sequence[Finding]


@dataclass(frozen=True)
class NamespaceSummary:
    """What one namespace holds. `namespace` is None when it was never remembered."""

    fingerprint: bytes
    namespace: Namespace | None
    blocks: int
    raw_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class DirectorySummary:
    """What a directory holds. `records` are the sound ones, of `frame.RECORD_DTYPE`."""

    path: Path
    allocated_bytes: int
    slab_bytes: int
    records: NDArray[np.void]
    damaged_records: int
    namespaces: Sequence[NamespaceSummary]

    @property
    def blocks(self) -> int:
        return len(self.records)

    @property
    def stored_bytes(self) -> int:
        return int(self.records["stored_bytes"].sum())

    @property
    def cut_off_blocks(self) -> int:
        """Blocks that reach beyond the end of the slab, by their records."""
        lengths = (self.records["stored_bytes"] + (ALIGN_BYTES - 1)) // ALIGN_BYTES * ALIGN_BYTES
        return int(np.count_nonzero(self.records["offset"] + lengths > self.slab_bytes))


class _Contents(NamedTuple):
    offsets: NDArray[np.uint64]  # under which each record stands
    records: NDArray[np.void]
    intact: NDArray[np.bool_]
    namespaces: Mapping[bytes, Namespace]


def read_directory(path: Path) -> DirectorySummary:
    """Blocks while records are read. Raises DirectoryError, as `NvmeTier` does."""
    with Directory(path, create=False) as directory:
        contents = _read(directory)
        sound = contents.records[contents.intact]
        return DirectorySummary(
            path=path,
            allocated_bytes=directory.allocated_bytes(),
            slab_bytes=_size(directory.slab),
            records=sound,
            damaged_records=len(contents.records) - len(sound),
            namespaces=_summaries(sound, contents.namespaces),
        )


def damaged_records(path: Path) -> int:
    """How many records the tier will drop when it is opened: they name no block that can be there.

    Blocks while records are read. Raises DirectoryError, as `NvmeTier` does.
    """
    sizes = Sizes.of(capacity_of(path))
    with Directory(path, create=False) as directory:
        contents = _read(directory)
    table = BlockTable(sizes.slab_bytes, sizes.max_blocks)
    return len(table.load(contents.offsets, Records(contents.records, contents.intact)))


def verify(path: Path) -> Iterator[Progress]:
    """Check every record against itself, its neighbours and its namespace, and every stored byte.

    Blocks while it reads up to 64 MiB, then reports. The last report has every
    block behind it. Raises DirectoryError, as `NvmeTier` does, before the first.
    """
    with Directory(path, create=False) as directory:
        contents = _read(directory)
        findings = _check_records(contents, _size(directory.slab))
        stored = contents.records["stored_bytes"][contents.intact]
        total, total_bytes = len(contents.records), int(stored.sum())
        blocks, nbytes = int((~contents.intact).sum()), 0
        yield Progress(blocks, total, nbytes, total_bytes, findings)
        for step in _steps(contents):
            findings = _check_bytes(directory.slab, contents, step)
            blocks += len(step)
            nbytes += int(contents.records["stored_bytes"][step].sum())
            yield Progress(blocks, total, nbytes, total_bytes, findings)


def _read(directory: Directory) -> _Contents:
    if not directory.records.exists():
        return _Contents(
            np.zeros(0, np.uint64), np.zeros(0, RECORD_DTYPE), np.zeros(0, dtype=bool), {}
        )
    try:
        records = RecordFile.read_only(directory.records)
        try:
            offsets, found = records.load()
            namespaces = records.namespaces()
        finally:
            records.close()
    except (*DamageError, lmdb.NotFoundError) as error:
        raise DirectoryError(f"{directory.records} is damaged: {error}") from error
    except lmdb.Error as error:
        raise DirectoryError(f"{directory.records} cannot be read: {error}") from error
    except OSError as error:
        raise directory.refusal(error) from error
    return _Contents(offsets, found.rows, found.intact, namespaces)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _summaries(
    records: NDArray[np.void], namespaces: Mapping[bytes, Namespace]
) -> list[NamespaceSummary]:
    owners = np.array(names(records["namespace"]), dtype="V16")
    fingerprints = sorted({*names(owners), *namespaces})
    summaries = []
    for fingerprint in fingerprints:
        mine = records[owners == np.void(fingerprint)]
        summaries.append(
            NamespaceSummary(
                fingerprint=fingerprint,
                namespace=namespaces.get(fingerprint),
                blocks=len(mine),
                raw_bytes=int(mine["raw_bytes"].sum()),
                stored_bytes=int(mine["stored_bytes"].sum()),
            )
        )
    return summaries


def _check_records(contents: _Contents, slab_bytes: int) -> list[Finding]:
    """Everything that can be seen without reading the slab."""
    findings = []
    end = 0
    seen: set[Key] = set()
    for place in np.argsort(contents.offsets, kind="stable").tolist():
        offset = int(contents.offsets[place])
        if not contents.intact[place]:
            findings.append(Finding(offset, None, "the record is damaged"))
            continue
        record = contents.records[place]
        key, namespace = record["key"].item(), record["namespace"].item()
        length = align_up(int(record["stored_bytes"]))
        problems = {
            "the record stands under another block's offset": int(record["offset"]) != offset,
            "the block reaches beyond the end of the slab": offset + length > slab_bytes,
            "the block overlaps the one before it": offset < end,
            "the block is recorded twice": key in seen,
            "the block's namespace is not known": namespace not in contents.namespaces,
            "the record has no checksum": not record["has_checksum"],
        }
        findings += [Finding(offset, key, text) for text, is_so in problems.items() if is_so]
        end = max(end, offset + length)
        seen.add(key)
    return findings


def _steps(contents: _Contents) -> Iterator[list[int]]:
    """Sound records in order of offset, cut into steps."""
    step: list[int] = []
    nbytes = 0
    for place in np.argsort(contents.offsets, kind="stable").tolist():
        if not contents.intact[place]:
            continue
        step.append(place)
        nbytes += int(contents.records["stored_bytes"][place])
        if nbytes >= STEP_BYTES:
            yield step
            step, nbytes = [], 0
    if step:
        yield step


def _check_bytes(slab: Path, contents: _Contents, step: Sequence[int]) -> list[Finding]:
    findings = []
    with open(slab, "rb", buffering=0) as file:
        for place in step:
            record = contents.records[place]
            offset, key = int(contents.offsets[place]), record["key"].item()
            problem = _check_block(file.fileno(), offset, record)
            if problem:
                findings.append(Finding(offset, key, problem))
        # What was read will not be read again: leave the page cache to others.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return findings


def _check_block(fd: int, offset: int, record: np.void) -> str:
    """What is wrong with a block's stored bytes; "" when nothing is."""
    try:
        stored = os.pread(fd, int(record["stored_bytes"]), offset)
    except (OSError, OverflowError) as error:
        return f"the block cannot be read: {error}"
    if len(stored) != record["stored_bytes"]:
        return "the slab ends within the block"
    if checksum(stored) != record["checksum"]:
        return "the stored bytes do not match their checksum"
    return ""

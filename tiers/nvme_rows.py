"""Records as rows of one array: whole batches are described, sealed and read at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.frame import CODEC_NUMBERS, RECORD_BYTES, RECORD_DTYPE, RECORD_VERSION, checksum
from kvstore.hashing import KEY_BYTES
from kvstore.retention import MAX_PRIORITY
from kvstore.tier import Record

RecordRows = NDArray[np.void]  # [n] of frame.RECORD_DTYPE

_CODEC_NAMES = {number: name for name, number in CODEC_NUMBERS.items()}
_SEAL_BYTES = 8
_SEALED_BYTES = RECORD_BYTES - _SEAL_BYTES


def fits_a_row(record: Record) -> bool:
    """Whether the format can hold what a caller says of a block."""
    return (
        len(record.key) == len(record.parent) == len(record.namespace) == KEY_BYTES
        and 0 <= record.shard_start < 1 << 16
        and 0 <= record.shard_heads < 1 << 16
        and 0 <= record.priority <= MAX_PRIORITY
    )


def describe(
    records: Sequence[Record],
    *,
    codec: str,
    offsets: Sequence[int],
    stored_bytes: Sequence[int],
    checksums: Sequence[int],
) -> RecordRows:
    """Rows, not yet sealed, of blocks that were stored with `codec`. All `fits_a_row`."""
    rows = np.zeros(len(records), RECORD_DTYPE)
    rows["version"] = RECORD_VERSION
    rows["codec"] = CODEC_NUMBERS[codec]
    rows["has_checksum"] = 1
    rows["offset"], rows["stored_bytes"], rows["checksum"] = offsets, stored_bytes, checksums
    rows["priority"] = [record.priority for record in records]
    rows["shard_start"] = [record.shard_start for record in records]
    rows["shard_heads"] = [record.shard_heads for record in records]
    rows["raw_bytes"] = [record.raw_bytes for record in records]
    rows["created_s"] = [record.created_s for record in records]
    rows["last_use_s"] = [record.last_use_s for record in records]
    rows["expires_s"] = [record.expires_s for record in records]
    rows["namespace"] = _names([record.namespace for record in records])
    rows["key"] = _names([record.key for record in records])
    rows["parent"] = _names([record.parent for record in records])
    return rows


def seal(rows: RecordRows) -> list[bytes]:
    """Seal rows in place; each as the bytes that `frame.pack_record` would give."""
    data = rows.tobytes()
    starts = range(0, len(data), RECORD_BYTES)
    rows["seal"] = [checksum(data[start : start + _SEALED_BYTES]) for start in starts]
    data = rows.tobytes()
    return [data[start : start + RECORD_BYTES] for start in starts]


def undescribe(
    rows: RecordRows, priorities: Sequence[int], expires_s: Sequence[float]
) -> list[Record]:
    """The records of rows, with the priorities and expiries that hold now."""
    return [
        Record(
            namespace, key, parent, raw, start, heads, _CODEC_NAMES[codec], stored, digest,
            created, used, priority, expires,
        )
        for (
            _, codec, _, _, start, heads, raw, stored, _, digest, created, used, _,
            namespace, key, parent, _,
        ), priority, expires in zip(rows.tolist(), priorities, expires_s, strict=True)
    ]  # fmt: skip


def _names(column: Sequence[bytes]) -> NDArray[np.void]:
    return np.frombuffer(b"".join(column), "V16")

"""Records and frames: what stands beside a block's bytes wherever they are written.

A record has a fixed length and carries a seal, the xxh3_64 of itself, so that a
flipped bit in it is noticed without reading the block. A frame, for places that
hold one object a block, is a header with the record, and then the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.errors import FrameError
from kvstore.hashing import KEY_BYTES
from kvstore.tier import Record

RECORD_VERSION = 1
MAGIC = b"kvstore\x01"  # the last byte is the version of the frame around the record

# Numbers on disk: append, and never use one again.
CODEC_NUMBERS = {"raw": 0, "zstd": 1}
_CODEC_NAMES = {number: name for name, number in CODEC_NUMBERS.items()}

# Record version 1, little-endian and without padding.
RECORD_DTYPE = np.dtype(
    [
        ("version", "u1"),
        ("codec", "u1"),
        ("priority", "u1"),
        ("has_checksum", "u1"),
        ("shard_start", "<u2"),
        ("shard_heads", "<u2"),
        ("raw_bytes", "<u8"),
        ("stored_bytes", "<u8"),
        ("offset", "<u8"),
        ("checksum", "<u8"),
        ("created_s", "<f8"),
        ("last_use_s", "<f8"),
        ("expires_s", "<f8"),
        ("namespace", "V16"),
        ("key", "V16"),
        ("parent", "V16"),
        ("seal", "<u8"),
    ]
)
_FIELDS = struct.Struct("<4B2H4Q3d16s16s16s")
_SEAL = struct.Struct("<Q")
_SEALED_BYTES = _FIELDS.size
RECORD_BYTES = _SEALED_BYTES + _SEAL.size
HEADER_BYTES = len(MAGIC) + RECORD_BYTES

checksum = xxhash.xxh3_64_intdigest
"""xxh3_64 of any buffer, as an int: what `Record.checksum` holds of the stored bytes."""


class Records(NamedTuple):
    """Many records as columns. Only rows that are `intact` mean anything."""

    rows: NDArray[np.void]  # [n] of RECORD_DTYPE
    intact: NDArray[np.bool_]  # [n]


def pack_record(record: Record, offset: int = 0) -> bytes:
    """The `RECORD_BYTES` bytes of a record, sealed.

    `offset` is where a tier with one space for all blocks keeps this one; the
    others have no use for it. Raises FrameError for what the format cannot hold.
    """
    names = (record.namespace, record.key, record.parent)
    if any(len(name) != KEY_BYTES for name in names):
        raise FrameError(f"namespace, key and parent must have {KEY_BYTES} bytes each: {record}")
    if record.codec not in CODEC_NUMBERS:
        raise FrameError(f"codec {record.codec!r} has no number in record version {RECORD_VERSION}")
    try:
        fields = _FIELDS.pack(
            RECORD_VERSION,
            CODEC_NUMBERS[record.codec],
            record.priority,
            record.checksum is not None,
            record.shard_start,
            record.shard_heads,
            record.raw_bytes,
            record.stored_bytes,
            offset,
            record.checksum or 0,
            record.created_s,
            record.last_use_s,
            record.expires_s,
            *names,
        )
    except struct.error as error:
        raise FrameError(f"does not fit into a record: {error}: {record}") from error
    return fields + _SEAL.pack(checksum(fields))


def unpack_record(data: bytes | memoryview) -> Record:
    """The record that `pack_record` wrote; its offset is only in `unpack_records`.

    Raises FrameError for anything else, be it one bit.
    """
    if len(data) != RECORD_BYTES:
        raise FrameError(f"a record has {RECORD_BYTES} bytes, not {len(data)}")
    if checksum(data[:_SEALED_BYTES]) != _SEAL.unpack_from(data, _SEALED_BYTES)[0]:
        raise FrameError("the record's seal is broken")
    version, codec, priority, has_checksum, *middle, namespace, key, parent = _FIELDS.unpack_from(
        data
    )
    start, heads, raw_bytes, stored_bytes, _offset, digest, created_s, last_use_s, expires_s = (
        middle
    )
    if version != RECORD_VERSION or codec not in _CODEC_NAMES:
        raise FrameError(
            f"record version {version} with codec {codec} is not known to this kvstore"
        )
    return Record(
        namespace=namespace,
        key=key,
        parent=parent,
        raw_bytes=raw_bytes,
        shard_start=start,
        shard_heads=heads,
        codec=_CODEC_NAMES[codec],
        stored_bytes=stored_bytes,
        checksum=digest if has_checksum else None,
        created_s=created_s,
        last_use_s=last_use_s,
        priority=priority,
        expires_s=expires_s,
    )


def unpack_records(data: Sequence[bytes]) -> Records:
    """Many records at once: about a second a million. Damage is marked, never raised."""
    wrong_length = [i for i, record in enumerate(data) if len(record) != RECORD_BYTES]
    if wrong_length:
        data = list(data)
        for i in wrong_length:
            data[i] = bytes(RECORD_BYTES)  # whose seal is broken
    rows = np.frombuffer(b"".join(data), RECORD_DTYPE)
    seals = np.fromiter((checksum(record[:_SEALED_BYTES]) for record in data), "<u8", len(data))
    intact = (
        (rows["seal"] == seals)
        & (rows["version"] == RECORD_VERSION)
        & np.isin(rows["codec"], list(_CODEC_NAMES))
    )
    return Records(rows, intact)


def pack_header(record: Record) -> bytes:
    """The `HEADER_BYTES` bytes that stand before the stored bytes in a frame."""
    return MAGIC + pack_record(record)


def unpack_header(data: bytes | memoryview) -> Record:
    """The record at the beginning of a frame, of which more may follow. Raises FrameError."""
    if len(data) < HEADER_BYTES:
        raise FrameError(f"a frame's header has {HEADER_BYTES} bytes, not {len(data)}")
    if data[: len(MAGIC)] != MAGIC:
        raise FrameError("not a kvstore frame, or of a version that this kvstore does not know")
    return unpack_record(data[len(MAGIC) : HEADER_BYTES])


def unpack_frame(frame: memoryview) -> tuple[Record, memoryview]:
    """The record, and a view of the stored bytes, whose length and checksum are right.

    Raises FrameError for anything else. Compare identity first with
    `unpack_header`: this one reads every byte.
    """
    record = unpack_header(frame)
    stored = frame[HEADER_BYTES:]
    if record.stored_bytes != stored.nbytes:
        raise FrameError(f"a frame with {stored.nbytes} bytes where {record.stored_bytes} belong")
    if record.checksum is None or record.checksum != checksum(stored):
        raise FrameError("the stored bytes do not match the record's checksum")
    return record, stored


def names(column: NDArray[np.void]) -> list[bytes]:
    """A column of namespaces, keys or parents as a list of bytes."""
    listed: list[Any] = column.tolist()
    return listed

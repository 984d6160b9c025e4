"""Records and frames come back as they were, and one flipped bit is enough to be refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvstore.codec import CODECS
from kvstore.errors import FrameError
from kvstore.frame import (
    CODEC_NUMBERS,
    HEADER_BYTES,
    RECORD_BYTES,
    RECORD_DTYPE,
    checksum,
    names,
    pack_header,
    pack_record,
    unpack_frame,
    unpack_header,
    unpack_record,
    unpack_records,
)
from kvstore.tier import Record

RECORD = Record(
    namespace=bytes(range(16)),
    key=bytes(range(16, 32)),
    parent=bytes(range(32, 48)),
    raw_bytes=131_072,
    shard_start=2,
    shard_heads=4,
    codec="zstd",
    stored_bytes=90_001,
    checksum=0x0123456789ABCDEF,
    created_s=1_700_000_000.25,
    last_use_s=1_700_000_001.5,
    priority=60,
    expires_s=1_700_003_600.0,
)

name = st.binary(min_size=16, max_size=16)
u16, u64 = st.integers(0, 2**16 - 1), st.integers(0, 2**64 - 1)
seconds = st.floats(allow_nan=False)
records = st.builds(
    Record,
    namespace=name,
    key=name,
    parent=name,
    raw_bytes=u64,
    shard_start=u16,
    shard_heads=u16,
    codec=st.sampled_from(CODECS),
    stored_bytes=u64,
    checksum=st.none() | u64,
    created_s=seconds,
    last_use_s=seconds,
    priority=st.integers(0, 100),
    expires_s=seconds,
)


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_the_format_is_what_it_has_always_been() -> None:
    # When this fails, directories that users have are no longer readable: give the
    # format a new version, and read the old one as well.
    assert pack_record(RECORD, offset=4096).hex() == (
        "01013c01020004000000020000000000915f0100000000000010000000000000efcdab8967452301"
        "00001040fc54d94100006040fc54d941000000c4ff54d941000102030405060708090a0b0c0d0e0f"
        "101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2fc548b3c2f8bab9e9"
    )


@given(records, u64)
def test_a_record_comes_back(record: Record, offset: int) -> None:
    packed = pack_record(record, offset)
    assert len(packed) == RECORD_BYTES
    assert unpack_record(packed) == record
    assert unpack_record(memoryview(packed)) == record


def test_no_checksum_is_not_a_checksum_of_zero() -> None:
    for digest in (None, 0):
        record = dataclasses.replace(RECORD, checksum=digest)
        assert unpack_record(pack_record(record)).checksum is digest


def test_every_flipped_bit_is_noticed() -> None:
    packed = pack_record(RECORD, 4096)
    damaged = [flipped(packed, bit) for bit in range(8 * RECORD_BYTES)]
    for record in damaged:
        with pytest.raises(FrameError):
            unpack_record(record)
    assert not unpack_records(damaged).intact.any()


@pytest.mark.parametrize("length", [0, 1, RECORD_BYTES - 1, RECORD_BYTES + 1, 2 * RECORD_BYTES])
def test_another_length_is_noticed(length: int) -> None:
    data = (pack_record(RECORD) * 2)[:length]
    with pytest.raises(FrameError, match="bytes"):
        unpack_record(data)
    whole = pack_record(RECORD)
    assert unpack_records([whole, data, whole]).intact.tolist() == [True, False, True]


@pytest.mark.parametrize("field", ["version", "codec"])
def test_a_record_of_the_future_is_refused_though_its_seal_is_right(field: str) -> None:
    row = np.frombuffer(pack_record(RECORD), RECORD_DTYPE).copy()
    row[field] = 200
    row["seal"] = checksum(row.tobytes()[:-8])
    with pytest.raises(FrameError, match="not known"):
        unpack_record(row.tobytes())
    assert not unpack_records([row.tobytes()]).intact.any()


@given(st.lists(st.tuples(records, u64), max_size=5))
def test_many_records_are_the_columns_of_each(pairs: list[tuple[Record, int]]) -> None:
    rows, intact = unpack_records([pack_record(record, offset) for record, offset in pairs])
    assert intact.shape == (len(pairs),)
    assert intact.all()
    assert rows["offset"].tolist() == [offset for _, offset in pairs]
    for column in ("namespace", "key", "parent"):
        assert names(rows[column]) == [getattr(record, column) for record, _ in pairs]
    for column in ("raw_bytes", "stored_bytes", "shard_start", "shard_heads", "priority"):
        assert rows[column].tolist() == [getattr(record, column) for record, _ in pairs]
    for column in ("created_s", "last_use_s", "expires_s"):
        assert rows[column].tolist() == [getattr(record, column) for record, _ in pairs]
    assert rows["codec"].tolist() == [CODEC_NUMBERS[record.codec] for record, _ in pairs]


@pytest.mark.parametrize(
    "change",
    [
        {"key": b"short"},
        {"parent": bytes(17)},
        {"namespace": b""},
        {"codec": "lz77"},
        {"raw_bytes": -1},
        {"stored_bytes": 2**64},
        {"priority": 256},
        {"shard_start": 2**16},
        {"checksum": -1},
    ],
)
def test_what_the_format_cannot_hold_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FrameError):
        pack_record(dataclasses.replace(RECORD, **change))


def test_every_codec_has_a_number_of_its_own() -> None:
    assert CODEC_NUMBERS.keys() == set(CODECS)
    assert len(set(CODEC_NUMBERS.values())) == len(CODECS)


@given(st.binary(max_size=300))
def test_the_checksum_is_xxh3_64(data: bytes) -> None:
    assert checksum(memoryview(data)) == xxhash.xxh3_64(data).intdigest()


def frame(stored: bytes, **changes: Any) -> bytes:
    record = dataclasses.replace(RECORD, stored_bytes=len(stored), checksum=checksum(stored))
    return pack_header(dataclasses.replace(record, **changes)) + stored


@given(records, st.binary(max_size=100))
def test_a_header_may_be_read_before_the_rest(record: Record, rest: bytes) -> None:
    header = pack_header(record)
    assert len(header) == HEADER_BYTES
    assert unpack_header(header) == record
    assert unpack_header(memoryview(header + rest)) == record


@given(st.binary(max_size=300))
def test_a_frame_comes_back_without_a_copy(stored: bytes) -> None:
    whole = memoryview(frame(stored))
    record, view = unpack_frame(whole)
    assert record.stored_bytes == len(stored)
    assert view == stored
    assert view.obj is whole.obj


def test_every_flipped_bit_of_a_frame_is_noticed() -> None:
    whole = frame(b"the stored bytes")
    for bit in range(8 * len(whole)):
        with pytest.raises(FrameError):
            unpack_frame(memoryview(flipped(whole, bit)))


def test_every_cut_of_a_frame_is_noticed() -> None:
    whole = frame(b"the stored bytes")
    for length in range(len(whole)):
        with pytest.raises(FrameError):
            unpack_frame(memoryview(whole[:length]))
    with pytest.raises(FrameError):
        unpack_frame(memoryview(whole + b"\0"))


def test_a_frame_without_a_checksum_is_not_believed() -> None:
    with pytest.raises(FrameError, match="checksum"):
        unpack_frame(memoryview(frame(b"bytes", checksum=None)))

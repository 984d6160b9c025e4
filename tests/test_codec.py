"""Codecs give back what they got, and take nothing on trust."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvstore.codec import CODECS, codec
from kvstore.errors import CodecError, TierError
from kvstore.layout import DTYPE_BYTES

BLOCK_BYTES = 128 << 10
PREFIX_BYTES = 16

names = st.sampled_from(CODECS)
dtypes = st.sampled_from(list(DTYPE_BYTES))


def decoded(name: str, dtype: str, stored: bytes, nbytes: int) -> bytes:
    """`stored` decoded into the middle of a larger buffer, whose ends must stay untouched."""
    arena = bytearray(b"\xa5" * (nbytes + 128))
    try:
        codec(name, dtype).decode(memoryview(stored).toreadonly(), memoryview(arena)[64:-64])
    finally:
        assert arena[:64] == arena[-64:] == b"\xa5" * 64
    return bytes(arena[64:-64])


def encoded(name: str, dtype: str, data: bytes) -> bytes:
    return bytes(codec(name, dtype).encode(memoryview(data)))


def kv(dtype: str) -> bytes:
    """A block like real KV: normal, with a scale of its own for each channel."""
    rng = np.random.default_rng(7)
    count = BLOCK_BYTES // DTYPE_BYTES[dtype]
    scale = np.tile(np.exp(rng.standard_normal(64) * 0.7), count // 64)
    values = (rng.standard_normal(count) * scale).astype(np.float32)
    if dtype == "bfloat16":
        return bytes((values.view(np.uint32) >> 16).astype(np.uint16).data)
    return bytes(values.astype(dtype).data)


@given(names, dtypes, st.binary(max_size=600))
def test_any_bytes_come_back(name: str, dtype: str, data: bytes) -> None:
    assert decoded(name, dtype, encoded(name, dtype, data), len(data)) == data


@given(names, dtypes, st.binary(min_size=1, max_size=9), st.integers(1, 3000))
def test_bytes_that_repeat_come_back(name: str, dtype: str, unit: bytes, times: int) -> None:
    data = unit * times
    assert decoded(name, dtype, encoded(name, dtype, data), len(data)) == data


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", CODECS)
def test_a_block_comes_back(name: str, dtype: str) -> None:
    data = kv(dtype)
    assert decoded(name, dtype, encoded(name, dtype, data), len(data)) == data


def test_special_values_come_back_bit_for_bit() -> None:
    every_bf16 = np.arange(1 << 16, dtype=np.uint16).tobytes()  # NaN payloads, -0, infinities
    assert (
        decoded("zstd", "bfloat16", encoded("zstd", "bfloat16", every_bf16), 1 << 17) == every_bf16
    )


# The entropy of these blocks' exponents allows 1.47 (bf16) and 1.19 (fp32).
@pytest.mark.parametrize(
    ("dtype", "ratio"), [("bfloat16", 1.455), ("float16", 1.15), ("float32", 1.17)]
)
def test_kv_becomes_smaller(dtype: str, ratio: float) -> None:
    data = kv(dtype)
    assert len(data) / len(encoded("zstd", dtype, data)) > ratio


def test_zeros_become_next_to_nothing() -> None:
    assert len(encoded("zstd", "bfloat16", bytes(BLOCK_BYTES))) < 100


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_noise_grows_by_a_few_bytes_only(dtype: str) -> None:
    noise = np.random.default_rng(3).bytes(BLOCK_BYTES)
    assert len(encoded("zstd", dtype, noise)) <= BLOCK_BYTES + PREFIX_BYTES + 8 * 4


def test_raw_copies_nothing_on_the_way_in() -> None:
    data = bytearray(b"before")
    view = codec("raw", "bfloat16").encode(memoryview(data))
    data[:] = b"after!"
    assert bytes(view) == b"after!"


@pytest.mark.parametrize("name", CODECS)
def test_views_of_any_format_are_bytes(name: str) -> None:
    floats, out = np.arange(32, dtype=np.float32), np.zeros((4, 8), np.float32)
    codec(name, "float32").decode(codec(name, "float32").encode(floats.data), out.data)
    assert np.array_equal(out.ravel(), floats)


@pytest.mark.parametrize("name", CODECS)
def test_every_cut_and_every_addition_is_noticed(name: str) -> None:
    data = kv("bfloat16")[:512]
    stored = encoded(name, "bfloat16", data)
    for length in range(len(stored)):
        with pytest.raises(CodecError):
            decoded(name, "bfloat16", stored[:length], len(data))
    with pytest.raises(CodecError):
        decoded(name, "bfloat16", stored + b"\0", len(data))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("nbytes", [0, 1, 510, 511, 513, 514, 1024])
def test_another_length_than_the_block_has_is_noticed(name: str, nbytes: int) -> None:
    stored = encoded(name, "bfloat16", kv("bfloat16")[:512])
    with pytest.raises(CodecError):
        decoded(name, "bfloat16", stored, nbytes)


@given(st.data())
def test_damage_is_an_error_or_other_bytes_but_nothing_else(data: st.DataObject) -> None:
    stored = bytearray(encoded("zstd", "bfloat16", kv("bfloat16")[:4096]))
    for _ in range(data.draw(st.integers(1, 4))):
        stored[data.draw(st.integers(0, len(stored) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(CodecError):
        assert len(decoded("zstd", "bfloat16", bytes(stored), 4096)) == 4096


@given(st.binary(max_size=200), st.integers(0, 64))
def test_noise_is_not_an_encoding(noise: bytes, nbytes: int) -> None:
    with suppress(CodecError):
        assert len(decoded("zstd", "float16", noise, nbytes)) == nbytes


def one_plane(raw_bytes: int, frame: bytes) -> bytes:
    return struct.pack("<BxxxxxxxQQ", 1, raw_bytes, len(frame)) + frame


def without_size(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


def with_window(data: bytes, log: int) -> bytes:
    """One uncompressed block in a frame that declares a window of `2**log` bytes (RFC 8878)."""
    descriptor, window = 0b01_0_0_0_0_00, log - 10 << 3
    size, block = len(data) - 256, len(data) << 3 | 1
    header = struct.pack("<IBBH", 0xFD2FB528, descriptor, window, size)
    return header + block.to_bytes(3, "little") + data


def test_a_frame_with_a_window_of_ours_is_read() -> None:
    data = b"x" * 4095 + b"y"
    assert decoded("zstd", "int8", one_plane(4096, with_window(data, 19)), 4096) == data


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(zstandard.compress(bytes(256 << 20)), id="a bomb"),
        pytest.param(without_size(bytes(256 << 20)), id="a bomb that hides its size"),
        pytest.param(with_window(b"x" * 4096, 30), id="a window of 1 GiB"),
        pytest.param(zstandard.compress(b"x" * 4096) * 2, id="two frames"),
        pytest.param(zstandard.compress(b"x" * 4096) + b"x", id="something behind the frame"),
        pytest.param(zstandard.compress(b"x" * 4095), id="a byte too few"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_what_decoding_allocates_is_bounded_by_the_block(frame: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            decoded("zstd", "int8", one_plane(4096, frame), 4096)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("planes", [0, 3, 5, 8, 255])
def test_a_number_of_planes_that_no_dtype_has_is_an_error(planes: int) -> None:
    stored = struct.pack("<BxxxxxxxQ", planes, 0) + bytes(8 * planes)
    with pytest.raises(CodecError):
        decoded("zstd", "bfloat16", stored, 0)


@pytest.mark.parametrize("lengths", [(4096, 2**64 - 4096), (2**63, 2**63), (0, 4096), (4096, 0)])
def test_plane_lengths_that_lie_are_errors(lengths: tuple[int, int]) -> None:
    stored = struct.pack("<BxxxxxxxQQQ", 2, 8192, *lengths) + bytes(4096)
    with pytest.raises(CodecError):
        decoded("zstd", "bfloat16", stored, 8192)


@pytest.mark.parametrize(
    ("planes", "declared_bytes", "raw_bytes"),
    [(2, 4, 2), (2, 2, 4), (2, 3, 3), (4, 6, 6), (1, 0, 4)],
)
def test_lengths_that_do_not_fit_each_other_are_errors(
    planes: int, declared_bytes: int, raw_bytes: int
) -> None:
    each = raw_bytes // planes
    prefix = struct.pack(f"<BxxxxxxxQ{planes}Q", planes, declared_bytes, *[each] * planes)
    with pytest.raises(CodecError):
        decoded("zstd", "bfloat16", prefix + bytes(each * planes), raw_bytes)


def test_encodings_do_not_depend_on_the_reader_s_dtype() -> None:
    data = kv("float32")
    assert decoded("zstd", "int8", encoded("zstd", "float32", data), len(data)) == data


def test_the_name_is_the_one_asked_for() -> None:
    assert [codec(name, "bfloat16").name for name in CODECS] == list(CODECS)


def test_an_unknown_codec_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(CodecError, match=r"lz77.*raw, zstd"):
        codec("lz77", "bfloat16")
    assert issubclass(CodecError, TierError)

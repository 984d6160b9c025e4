"""Codecs: how a tier writes a block's bytes down. Pure functions of bytes.

A codec does not have to make a block smaller, it has to give the same bytes back.
`decode` takes nothing on trust: it reads only what it was given, writes only the
buffer that it was given, and allocates no more than that buffer's length.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple, Protocol

import numpy as np
import zstandard
from numpy.typing import NDArray

from kvstore.errors import CodecError
from kvstore.layout import DTYPE_BYTES

# Entropy coding with next to no search for repeats. KV has none, and the search
# costs: against plain level 1 this is 2-3 times as fast to encode, nearly twice as
# fast to decode, and 1 % smaller. Runs, such as a block of zeros, are still found.
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6)
_MAX_WINDOW_BYTES = 8 << 20  # 16 times what _PARAMETERS give: a larger one is not ours
_WORTH = 15 / 16  # a plane that shrinks by less is kept as it is: decoding costs more than it saves
_PREFIX = struct.Struct("<BxxxxxxxQ")  # number of planes, raw length; then a u64 length a plane
_WORDS: dict[int, np.dtype[np.unsignedinteger[Any]]] = {
    1: np.dtype("u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
}


class Codec(Protocol):
    """One way of writing blocks down. Stateless: any thread may call it, at the same time."""

    @property
    def name(self) -> str:
        """What stands in `Record.codec`."""
        ...

    def encode(self, data: memoryview) -> memoryview:
        """The bytes to store: new ones, or `data` itself. Any length is right, also zero."""
        ...

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Write the block to `out`, whose length is the block's exactly.

        Raises CodecError when `stored` is not an encoding of that many bytes;
        `out` then holds anything.
        """
        ...


class Raw(NamedTuple):
    """The bytes as they are. `encode` copies nothing."""

    name: str = "raw"

    def encode(self, data: memoryview) -> memoryview:
        return data.cast("B")

    def decode(self, stored: memoryview, out: memoryview) -> None:
        if stored.nbytes != out.nbytes:
            raise CodecError(f"{stored.nbytes} raw bytes stored where {out.nbytes} belong")
        out.cast("B")[:] = stored.cast("B")


class Zstd(NamedTuple):
    """Byte planes, each compressed by itself if that pays.

    The elements' first bytes, second bytes and so on are set apart, so that for
    bf16, fp16 and fp32 sign and exponent, which compress, no longer lie between
    mantissas, which do not. The low exponent bit of bf16 stays in the mantissa's
    plane: to move it makes 0.5 % less and takes three times as long.

    Stored: number of planes (u8, 7 bytes of padding), raw length (u64), stored
    length of each plane (u64), then the planes, the least significant first. A plane
    that is as long as it was is not compressed. Decoding needs no dtype.
    """

    element_bytes: int
    name: str = "zstd"

    def encode(self, data: memoryview) -> memoryview:
        whole = not data.nbytes % self.element_bytes
        words = np.frombuffer(data, _WORDS[self.element_bytes if whole else 1])
        planes = [_squeeze(plane) for plane in _split(words)]
        prefix = _PREFIX.pack(len(planes), data.nbytes)
        lengths = struct.pack(f"<{len(planes)}Q", *(len(plane) for plane in planes))
        return memoryview(b"".join((prefix, lengths, *planes)))

    def decode(self, stored: memoryview, out: memoryview) -> None:
        stored = stored.cast("B")
        lengths, start = _lengths(stored, out.nbytes)
        words = np.frombuffer(out, _WORDS[len(lengths)])
        plane_bytes = words.size
        planes = []
        for length in lengths:
            planes.append(_unsqueeze(stored[start : start + length], plane_bytes))
            start += length
        words[:] = planes.pop()
        while planes:
            np.left_shift(words, 8, out=words)
            np.bitwise_or(words, planes.pop(), out=words)


def codec(name: str, dtype: str) -> Codec:
    """The codec called `name` for blocks of `dtype` (a KV dtype of `kvstore.layout`).

    Raises CodecError for a name that no codec has.
    """
    if name == "raw":
        return Raw()
    if name == "zstd":
        return Zstd(DTYPE_BYTES[dtype])
    raise CodecError(f"codec {name!r} is not known; there are {', '.join(CODECS)}")


CODECS = ("raw", "zstd")


def _split(words: NDArray[np.unsignedinteger[Any]]) -> list[NDArray[np.uint8]]:
    """Byte planes of `words`, the least significant first."""
    # A narrowing cast of contiguous words is vectorised, a strided copy of bytes is not.
    bits = range(0, 8 * words.itemsize, 8)
    return [(words >> shift if shift else words).astype(np.uint8) for shift in bits]


def _squeeze(plane: NDArray[np.uint8]) -> bytes | memoryview:
    """`plane` compressed, or as it is when that saves too little."""
    # A compressor may be used by one thread at a time, and costs 10 µs to make.
    small = zstandard.ZstdCompressor(compression_params=_PARAMETERS).compress(plane.data)
    return small if len(small) < _WORTH * plane.nbytes else plane.data


def _unsqueeze(stored: memoryview, plane_bytes: int) -> NDArray[np.uint8]:
    """The plane that `_squeeze` was given. Raises CodecError."""
    if stored.nbytes == plane_bytes:
        return np.frombuffer(stored, np.uint8)
    try:
        frame = zstandard.get_frame_parameters(stored)
        # Checked before decompressing: both are sizes that zstd would allocate.
        if frame.content_size != plane_bytes:
            raise CodecError(f"a plane of {frame.content_size} bytes where {plane_bytes} belong")
        if frame.window_size > _MAX_WINDOW_BYTES:
            raise CodecError(f"a zstd window of {frame.window_size} bytes")
        plane = zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"not a zstd frame: {error}") from error
    return np.frombuffer(plane, np.uint8)


def _lengths(stored: memoryview, raw_bytes: int) -> tuple[tuple[int, ...], int]:
    """Stored length of each plane, and where the first begins; they fill `stored` exactly."""
    if stored.nbytes < _PREFIX.size:
        raise CodecError(f"{stored.nbytes} bytes are too few for a zstd block")
    planes, declared_bytes = _PREFIX.unpack_from(stored)
    start = _PREFIX.size + 8 * planes
    if planes not in _WORDS or declared_bytes != raw_bytes or raw_bytes % planes:
        raise CodecError(f"{planes} planes of {declared_bytes} bytes where {raw_bytes} belong")
    if stored.nbytes < start:
        raise CodecError(f"{stored.nbytes} bytes are too few for {planes} planes")
    lengths: tuple[int, ...] = struct.unpack_from(f"<{planes}Q", stored, _PREFIX.size)
    if start + sum(lengths) != stored.nbytes:
        raise CodecError(f"planes of {sum(lengths)} bytes in {stored.nbytes - start}")
    return lengths, start

"""The header of a GGUF file: its metadata, and where each tensor lies.

Format: the GGUF specification in ggml's docs/gguf.md, versions 2 and 3, little-endian.
The `gguf` package has a reader too; it takes seconds for a large vocabulary, and follows
lengths out of the file when the file is cut short. This one takes tenths, and checks each.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from kvstore.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

# Numbers of the value types in a file, and the scalars' NumPy types.
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


class TensorPlace(NamedTuple):
    """One tensor: rows first (as in NumPy), its type, and its bytes in the file."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]
    nbytes: int
    """Where tensor data begins."""


def read_header(path: Path) -> GGUFHeader:
    """Read all of the header. Raises ModelError when `path` is not a whole GGUF file."""
    try:
        with path.open("rb") as stream:
            return _Reader(stream, path.stat().st_size).header()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except _DamagedError as error:
        raise ModelError(f"{path} {error}") from error


class _DamagedError(Exception):
    """The rest of a sentence that begins with the file's name."""


class _Reader:
    """Reads one thing after another, and nothing past the file's end."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._size = size
        self._at = 0

    def header(self) -> GGUFHeader:
        if self._size < len(MAGIC) or self._take(len(MAGIC)) != MAGIC:
            raise _DamagedError("is not a GGUF file")
        version = self._uint32()
        if version not in VERSIONS:
            raise _DamagedError(f"is GGUF version {version}; supported are 2 and 3, little-endian")
        tensor_count, field_count = self._uint64(), self._uint64()
        metadata = {}
        for _ in range(field_count):
            key = self._string()
            metadata[key] = self._value(self._uint32())
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise _DamagedError(f"has alignment {alignment!r}")
        start = -(-self._at // alignment) * alignment
        return GGUFHeader(metadata, dict(self._place(start, *info) for info in infos), start)

    def _place(
        self, start: int, name: str, shape: tuple[int, ...], type_number: int, offset: int
    ) -> tuple[str, TensorPlace]:
        try:
            kind = GGMLQuantizationType(type_number)
        except ValueError:
            raise _DamagedError(f"has {name} in unknown quantisation {type_number}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if min(shape, default=0) < 1 or shape[-1] % block:
            raise _DamagedError(f"has {name} of impossible shape {shape} for {kind.name}")
        nbytes = math.prod(shape) // block * block_bytes
        if start + offset + nbytes > self._size:
            raise _DamagedError(f"is cut short: {name} ends past its end")
        return name, TensorPlace(shape, kind, start + offset, nbytes)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._uint32()
        if dimensions > MAX_DIMENSIONS:
            raise _DamagedError(f"has a tensor of {dimensions} dimensions")
        shape = tuple(reversed([self._uint64() for _ in range(dimensions)]))
        return name, shape, self._uint32(), self._uint64()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._uint32(), self._uint64())
        return self._scalars(kind, 1)[0]

    def _array(self, kind: int, length: int) -> list[Any]:
        if kind == _STRING:
            string: Callable[[], str] = self._string
            return [string() for _ in range(length)]
        return self._scalars(kind, length)

    def _scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:  # nested arrays too: llama.cpp does not take them either
            raise _DamagedError(f"has metadata of unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        values: list[Any] = np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()
        return values

    def _string(self) -> str:
        return self._take(self._uint64()).decode(errors="replace")

    def _uint32(self) -> int:
        (number,) = struct.unpack("<I", self._take(4))
        return int(number)

    def _uint64(self) -> int:
        (number,) = struct.unpack("<Q", self._take(8))
        return int(number)

    def _take(self, nbytes: int) -> bytes:
        self._at += nbytes
        if self._at > self._size:
            raise _DamagedError("is cut short: its header ends past its end")
        return self._stream.read(nbytes)

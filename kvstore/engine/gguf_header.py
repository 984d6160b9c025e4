"""The header of a GGUF file: metadata and where each tensor lies.

Format: the GGUF specification, versions 2 and 3, little-endian. The `gguf` package
reads it too, but takes seconds for a vocabulary, since it maps every string.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kvstore.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# No header is near these; a wrong file is refused before it makes us read all of it.
MAX_ENTRIES = 1 << 20
MAX_TEXT_BYTES = 1 << 26

_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i",
    6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` has rows first; `kind` is a ggml type number; `offset` counts from the data."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data_offset: int


def read_header(path: Path) -> GGUFHeader:
    """Raises ModelError when `path` is not a GGUF file of a version that we know."""
    try:
        with path.open("rb") as stream:
            return _Reader(stream, path).header()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except (struct.error, UnicodeDecodeError, ZeroDivisionError, TypeError) as error:
        raise ModelError(f"{path} is cut short or damaged: its header ends early") from error


class _Reader:
    """Reads one value after another; struct.error at the end of the file."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream = stream
        self._path = path

    def header(self) -> GGUFHeader:
        if self._stream.read(4) != MAGIC:
            raise ModelError(f"{self._path} is not a GGUF file")
        version = self._scalar("<I")
        if version not in VERSIONS:
            raise ModelError(f"{self._path} is GGUF version {version}; 2 and 3 are supported")
        tensor_count, field_count = self._count(), self._count()
        metadata = {}
        for _ in range(field_count):
            name = self._text()
            metadata[name] = self._value(self._scalar("<I"))
        tensors = {}
        for _ in range(tensor_count):
            name = self._text()
            shape = tuple(self._scalar("<Q") for _ in range(self._scalar("<I")))
            tensors[name] = TensorInfo(shape[::-1], self._scalar("<I"), self._scalar("<Q"))
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        return GGUFHeader(metadata, tensors, -(-self._stream.tell() // alignment) * alignment)

    def _scalar(self, form: str) -> Any:
        return struct.unpack(form, self._stream.read(struct.calcsize(form)))[0]

    def _count(self) -> int:
        return self._bounded(MAX_ENTRIES)

    def _text(self) -> str:
        length = self._bounded(MAX_TEXT_BYTES)
        data = self._stream.read(length)
        if len(data) != length:
            raise struct.error("text ends past the file")
        return data.decode()

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind == _ARRAY:
            return self._array(self._scalar("<I"), self._count())
        if kind not in _SCALARS:
            raise ModelError(f"{self._path} is damaged: metadata of unknown type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind in _SCALARS:
            form = f"<{count}{_SCALARS[kind][1]}"
            return list(struct.unpack(form, self._stream.read(struct.calcsize(form))))
        return [self._value(kind) for _ in range(count)]

    def _bounded(self, most: int) -> int:
        count: int = self._scalar("<Q")
        if count > most:
            raise ModelError(f"{self._path} is damaged: its header counts {count} entries")
        return count

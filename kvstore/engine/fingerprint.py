"""A digest of weights that reads a little of every tensor instead of all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

SAMPLE_BYTES = 1024
SAMPLES = 8


class Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


def fingerprint_ranges(digest: Digest, file: Path, ranges: Sequence[tuple[int, int]]) -> None:
    """Feed `digest` samples of each (offset, nbytes) range of `file`.

    A range of up to SAMPLES * SAMPLE_BYTES is fed whole; of a longer one, SAMPLES pieces
    spread evenly, the first and the last bytes among them.
    """
    with file.open("rb", buffering=0) as stream:
        for offset, nbytes in ranges:
            for start, length in sample(nbytes):
                stream.seek(offset + start)
                digest.update(stream.read(length))


def sample(nbytes: int) -> list[tuple[int, int]]:
    """The (start, length) pieces of a range of `nbytes` that are read."""
    if nbytes <= SAMPLES * SAMPLE_BYTES:
        return [(0, nbytes)]
    stride = (nbytes - SAMPLE_BYTES) / (SAMPLES - 1)
    return [(round(i * stride), SAMPLE_BYTES) for i in range(SAMPLES)]

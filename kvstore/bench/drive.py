"""How fast the drive can be read, by nothing but reads: large, direct, several at once."""

from __future__ import annotations

import mmap
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path

from kvstore.bench.turns import timed

_PIECE_BYTES = 2 << 20
_WRITE_BYTES = 64 << 20
_DEPTHS = (1, 2, 4, 8, 16, 32)
_TRIED_PIECES = 256  # with each of them


class Drive:
    """A file of random bytes, and its pieces in random order. Everything here blocks."""

    def __init__(self, file: int, nbytes: int, direct: bool, written_s: float) -> None:
        self._file = file
        self.direct = direct
        self.write_bytes_per_s = nbytes / written_s
        self._offsets = list(range(0, nbytes, _PIECE_BYTES))
        random.Random(0).shuffle(self._offsets)
        self.total_bytes = len(self._offsets) * _PIECE_BYTES
        tried = {depth: self._seconds(depth, _TRIED_PIECES) for depth in _DEPTHS}
        self.depth, seconds = min(tried.items(), key=itemgetter(1))
        pieces = min(_TRIED_PIECES, len(self._offsets))
        self.read_bytes_per_s = pieces * _PIECE_BYTES / seconds

    def seconds(self) -> float:
        """Of reading all of it once, with as many reads at once as were found to be best."""
        return self._seconds(self.depth, len(self._offsets))

    @property
    def about(self) -> str:
        how = "O_DIRECT" if self.direct else "buffered: O_DIRECT is refused here"
        return f"reads of 2 MiB, {self.depth} at once, {how}"

    def _seconds(self, depth: int, pieces: int) -> float:
        left = iter(self._offsets[:pieces])

        def read() -> None:
            with mmap.mmap(-1, _PIECE_BYTES) as buffer:
                for offset in left:  # one iterator for all threads: each piece is read once
                    if os.preadv(self._file, [buffer], offset) != _PIECE_BYTES:
                        raise OSError("the file that is read is shorter than it was")

        with ThreadPoolExecutor(depth) as threads:
            begin = time.perf_counter()
            for done in [threads.submit(read) for _ in range(depth)]:
                done.result()
            return time.perf_counter() - begin


@contextmanager
def reading(directory: Path, nbytes: int) -> Iterator[Drive]:
    """A drive measured over a file of about `nbytes` in `directory`, which is removed at the end.

    Takes as long as writing it and reading it a few times.
    """
    path = directory / "reads"
    pieces = max(1, nbytes // _PIECE_BYTES)
    written_s = timed(partial(_write, path, pieces * _PIECE_BYTES))()
    file, direct = _open(path)
    try:
        yield Drive(file, pieces * _PIECE_BYTES, direct, written_s)
    finally:
        os.close(file)
        path.unlink()


def _write(path: Path, nbytes: int) -> None:
    generate: Callable[[int], bytes] = random.Random(1).randbytes
    content = generate(min(nbytes, _WRITE_BYTES))
    with path.open("wb") as out:
        for start in range(0, nbytes, len(content)):
            out.write(content[: nbytes - start])
        out.flush()
        os.fsync(out.fileno())
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _open(path: Path) -> tuple[int, bool]:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT), True
    except OSError:  # tmpfs, overlays
        return os.open(path, os.O_RDONLY), False

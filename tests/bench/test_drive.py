"""The drive alone: every piece of a file is read once, whatever the depth, and the file goes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvstore.bench.drive import reading

MiB = 1 << 20


def test_all_of_a_file_is_read_and_then_it_is_gone(tmp_path: Path) -> None:
    with reading(tmp_path, 9 * MiB) as drive:
        (file,) = tmp_path.iterdir()
        assert file.stat().st_size == drive.total_bytes == 8 * MiB
        assert drive.seconds() > 0
        assert drive.read_bytes_per_s > 0
        assert drive.write_bytes_per_s > 0
        assert f"{drive.depth} at once" in drive.about
        assert ("O_DIRECT is refused" in drive.about) is not drive.direct
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("depth", [1, 3, 32])
def test_each_piece_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    read: list[int] = []
    preadv = os.preadv

    def counted(file: int, buffers: list[memoryview], offset: int) -> int:
        read.append(offset)
        return preadv(file, buffers, offset)

    with reading(tmp_path, 8 * MiB) as drive:
        monkeypatch.setattr(os, "preadv", counted)
        drive.depth = depth
        drive.seconds()
        monkeypatch.undo()
    assert sorted(read) == [0, 2 * MiB, 4 * MiB, 6 * MiB]
    assert read != sorted(read), "the order is random"


def test_a_file_that_has_become_shorter_is_no_measurement(tmp_path: Path) -> None:
    with reading(tmp_path, 8 * MiB) as drive:
        (file,) = tmp_path.iterdir()
        os.truncate(file, 4 * MiB)
        with pytest.raises(OSError, match="shorter"):
            drive.seconds()

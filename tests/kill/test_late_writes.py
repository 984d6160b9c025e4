"""What a killed process had asked of the drive may be done after it is gone."""

from __future__ import annotations

import fcntl
import mmap
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from kvstore.tiers.blockfile import Block, BlockFile
from kvstore.tiers.driver import open_driver
from tests.kill.victims import ROOT, spin
from tests.kill.writer import PIECE_BYTES, PIECES

PAGE_BYTES = 4096


@pytest.mark.parametrize("seed", range(4))
def test_whoever_opens_the_file_waits_until_nothing_changes_any_more(
    tmp_path: Path, seed: int
) -> None:
    path = tmp_path.resolve() / "slab"
    die_writing(path, Random(seed))
    at_once = ends_of_pieces(path)
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # by now, whatever was in flight has landed
    assert ends_of_pieces(path) == at_once
    path.unlink()  # large


def die_writing(path: Path, random: Random) -> None:
    command = [sys.executable, "-m", "tests.kill.writer", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        for _ in range(random.randint(2, 4)):
            assert writer.stdout.readline() == b"writing\n"
        spin(random.uniform(0, 0.01))
        writer.kill()


def ends_of_pieces(path: Path) -> bytes:
    """A byte of the last page of each piece."""
    memory = memoryview(mmap.mmap(-1, PIECES * PAGE_BYTES))
    blocks = [
        Block((n + 1) * PIECE_BYTES - PAGE_BYTES, memory[n * PAGE_BYTES : (n + 1) * PAGE_BYTES])
        for n in range(PIECES)
    ]
    driver = open_driver("auto")
    file = BlockFile(path, driver)
    file.read(blocks, lambda number, error: None)
    file.close()
    driver.close()
    return bytes(memory[::PAGE_BYTES])

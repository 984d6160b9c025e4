"""Who may open an NVMe directory, and with what; every refusal is one clear line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.errors import DirectoryError, SettingsError
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.nvme_directory import Sizes
from tests.tiers.subjects import CAPACITY_BYTES, item, run

ROOT = Path(__file__).parents[2]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    NvmeTier(path, CAPACITY_BYTES).close_now()
    assert sorted(entry.name for entry in path.iterdir()) == [
        *("format", "lock"),
        *("records.mdb", "slab"),
    ]
    assert all(entry.stat().st_mode & 0o077 == 0 for entry in (path / "slab", path / "records.mdb"))


def test_in_use_by_this_process_or_another(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, CAPACITY_BYTES)
    with pytest.raises(DirectoryError, match=f"in use by process {os.getpid()}"):
        NvmeTier(tmp_path, CAPACITY_BYTES)
    child = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert f"DirectoryError: {tmp_path} is in use by process {os.getpid()}" in child.stderr
    tier.close_now()
    NvmeTier(tmp_path, CAPACITY_BYTES).close_now()


OPEN = f"""
import sys
from pathlib import Path
from kvstore.tiers.nvme import NvmeTier
NvmeTier(Path(sys.argv[1]), {CAPACITY_BYTES}).close_now()
"""


def test_a_newer_format(tmp_path: Path) -> None:
    NvmeTier(tmp_path, CAPACITY_BYTES).close_now()
    (tmp_path / "format").write_text("kvstore nvme format 2\n")
    with pytest.raises(DirectoryError, match=r"newer kvstore \(format 2, this one knows up to 1\)"):
        NvmeTier(tmp_path, CAPACITY_BYTES)


@pytest.mark.parametrize("text", ["", "something else\n", "kvstore nvme format x\n"])
def test_a_format_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "format").write_text(text)
    with pytest.raises(DirectoryError, match="not a kvstore NVMe directory"):
        NvmeTier(tmp_path, CAPACITY_BYTES)


def test_somebody_elses_slab_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "slab").write_bytes(b"precious")
    with pytest.raises(DirectoryError, match="not a kvstore NVMe directory"):
        NvmeTier(tmp_path, CAPACITY_BYTES)
    assert (tmp_path / "slab").read_bytes() == b"precious"


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryError, match="cannot be used: File exists"):
        NvmeTier(tmp_path / "file", CAPACITY_BYTES)


def test_no_permission(tmp_path: Path) -> None:
    """As a user who is not root: root may do anything."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    drop = "import os\nif os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
    child = subprocess.run(
        [sys.executable, "-c", OPEN.replace("NvmeTier(Path", drop + "NvmeTier(Path"), str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert f"DirectoryError: no permission to use {folder}" in child.stderr
    assert not list(folder.iterdir())


@pytest.mark.parametrize("capacity_bytes", [0, 1, (1 << 20) - 1])
def test_too_small(capacity_bytes: int, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="needs at least 1 MiB"):
        NvmeTier(tmp_path, capacity_bytes)


def test_more_than_the_disk_has(tmp_path: Path) -> None:
    async def body() -> None:
        tier = NvmeTier(tmp_path, CAPACITY_BYTES)
        await tier.write([item(1)])
        await tier.close()

    run(body())
    with pytest.raises(SettingsError, match="does not fit on the disk"):
        NvmeTier(tmp_path, 1 << 60)
    tier = NvmeTier(tmp_path, CAPACITY_BYTES)  # nothing was lost by asking
    assert tier.stats()["blocks"] == 1
    tier.close_now()


def test_a_driver_that_fails_to_open_leaves_nothing_open(tmp_path: Path) -> None:
    """The suite's leak check looks at files and threads when this is over."""
    for _ in range(3):
        with pytest.raises(SettingsError):
            NvmeTier(tmp_path, 1)


@pytest.mark.parametrize("exponent", range(20, 50, 3))
def test_sizes_add_up(exponent: int) -> None:
    capacity_bytes = (1 << exponent) + 12_345
    sizes = Sizes.of(capacity_bytes)
    assert sizes.slab_bytes + sizes.map_bytes < capacity_bytes
    assert sizes.slab_bytes % 4096 == sizes.map_bytes % 4096 == 0
    assert sizes.slab_bytes > 0.6 * capacity_bytes
    if exponent >= 30:
        assert sizes.slab_bytes > 0.98 * capacity_bytes
        assert sizes.max_blocks * 49_300 > sizes.slab_bytes

"""Who may open an NVMe directory, and with what; every refusal is one clear line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.errors import DirectoryError, SettingsError
from kvstore.machine import free_disk_bytes
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
    assert child.stderr.endswith(
        f"DirectoryError: {tmp_path} is in use by process {os.getpid()}; "
        "give every process a directory of its own\n"
    )
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


def test_a_folder_of_something_else_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "photo").write_bytes(b"precious")
    with pytest.raises(
        DirectoryError, match=rf"a new or empty folder, such as {tmp_path}/kvstore$"
    ):
        NvmeTier(tmp_path, CAPACITY_BYTES)
    assert os.listdir(tmp_path) == ["photo"]
    NvmeTier(tmp_path / "kvstore", CAPACITY_BYTES).close_now()


@pytest.mark.parametrize("text", ["something else\n", "kvstore nvme format 2\n"])
def test_a_format_that_is_refused_leaves_no_lock(text: str, tmp_path: Path) -> None:
    (tmp_path / "format").write_text(text)
    with pytest.raises(DirectoryError):
        NvmeTier(tmp_path, CAPACITY_BYTES)
    assert os.listdir(tmp_path) == ["format"]


def test_a_fresh_file_system_and_a_beginning_that_was_killed_are_empty(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "lock").write_text("123\n")
    (tmp_path / "format.new").write_text("kvst")
    NvmeTier(tmp_path, CAPACITY_BYTES).close_now()


def test_what_joins_a_directory_of_ours_is_no_reason_to_refuse_it(tmp_path: Path) -> None:
    NvmeTier(tmp_path, CAPACITY_BYTES).close_now()
    (tmp_path / "notes").write_text("")
    NvmeTier(tmp_path, CAPACITY_BYTES).close_now()


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryError, match="cannot be used: Not a directory"):
        NvmeTier(tmp_path / "file", CAPACITY_BYTES)


def test_no_permission(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    assert f"DirectoryError: no permission to use {folder}" in opened_by_nobody(folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["slab", "records.mdb", "lock", "format"])
def test_no_permission_on_one_of_its_files(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "blocks"
    NvmeTier(folder, CAPACITY_BYTES).close_now()
    open_to_all(folder)
    assert opened_by_nobody(folder) == ""
    before = (folder / name).read_bytes()
    (folder / name).chmod(0)
    assert f"DirectoryError: no permission to use {folder / name}" in opened_by_nobody(folder)
    assert (folder / name).read_bytes() == before


def test_no_permission_to_shrink_the_records(tmp_path: Path) -> None:
    """Which needs a second file; every file that is there may be written."""
    folder = tmp_path / "blocks"
    NvmeTier(folder, 16 * CAPACITY_BYTES).close_now()
    open_to_all(folder)
    folder.chmod(0o555)
    assert f"DirectoryError: no permission to use {folder}: mdb_" in opened_by_nobody(folder)


def test_records_that_were_shrunk_are_nobody_elses_to_read(tmp_path: Path) -> None:
    NvmeTier(tmp_path, 16 * CAPACITY_BYTES).close_now()
    before = (tmp_path / "records.mdb").stat()
    NvmeTier(tmp_path, CAPACITY_BYTES).close_now()
    after = (tmp_path / "records.mdb").stat()
    assert after.st_size < before.st_size
    assert after.st_mode == before.st_mode


def open_to_all(folder: Path) -> None:
    folder.chmod(0o777)
    for path in folder.iterdir():
        path.chmod(0o666)


def opened_by_nobody(folder: Path) -> str:
    """What Python says when a user who is not root opens it: root may do anything."""
    for parent in folder.parents[:3]:
        parent.chmod(0o755)
    drop = "import os\nif os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
    child = subprocess.run(
        [sys.executable, "-c", OPEN.replace("NvmeTier(Path", drop + "NvmeTier(Path"), str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return child.stderr


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


@pytest.mark.parametrize("capacity_bytes", [20 << 20, 20_000_000, CAPACITY_BYTES])
def test_a_directory_has_room_for_what_it_was_made_for(
    capacity_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk as well, and whatever else lies there."""
    path = tmp_path / "blocks"
    NvmeTier(path, capacity_bytes).close_now()
    (path / "foreign").write_bytes(bytes(1 << 20))
    disk = os.statvfs(path)
    full = os.statvfs_result((*disk[:4], 0, *disk[5:]))  # f_bavail
    assert full.f_bavail == 0
    with monkeypatch.context() as patched:
        patched.setattr("os.statvfs", lambda _: full)
        assert capacity_bytes <= free_disk_bytes(path) < capacity_bytes + (128 << 10)
        NvmeTier(path, capacity_bytes).close_now()
        with pytest.raises(SettingsError, match="does not fit on the disk"):
            NvmeTier(path, capacity_bytes + (128 << 10))
        assert free_disk_bytes(tmp_path / "new") == 0


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

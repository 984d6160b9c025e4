"""`kvstore.open`: from names and sizes to a store that works, or one clear error."""

from __future__ import annotations

import dataclasses
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

import kvstore
from kvstore import sources
from kvstore.errors import DirectoryError, SettingsError
from kvstore.hub import Bounds
from kvstore.machine import has_tier
from kvstore.quantities import format_size
from kvstore.settings import MiB, Settings, StoreSettings
from kvstore.sources import override
from kvstore.tiers.nvme_verify import read_directory
from tests.cli.commands import fill


def test_ram_alone() -> None:
    with kvstore.open(ram_bytes="8 MiB") as store:
        chain = fill(store, 4).chain()
        assert store.probe(chain).tiers == ["ram"] * 4
        stats = store.stats()
        assert (stats.ram["capacity_bytes"], stats.nvme) == (8 * MiB, {})


@pytest.mark.parametrize("name", ["engine_model", "tenant_salt", "daemon_socket"])
def test_what_a_store_would_ignore_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}: no setting of a store"):
        kvstore.open(ram_bytes="8 MiB", **{name: "x"})


def test_a_second_store_serves_what_the_first_kept(tmp_path: Path) -> None:
    where = {"ram_bytes": "8 MiB", "nvme_path": tmp_path / "blocks", "nvme_bytes": "16 MiB"}
    with kvstore.open(**where) as store:
        chain = fill(store, 4).chain()
    with kvstore.open(**where) as store:
        assert store.probe(chain).tiers == ["nvme"] * 4
        with store.acquire(chain) as lease:
            assert lease.wait() == 4
            assert [bytes(view[:1]) for view in lease.views] == [b"\0", b"\1", b"\2", b"\3"]


def test_every_nvme_setting_reaches_the_tier(tmp_path: Path) -> None:
    path = tmp_path / "blocks"
    settings = override(
        None,
        {
            "nvme_path": str(path),
            "nvme_bytes": "16 MiB",
            "nvme_codec": "zstd",
            "nvme_driver": "threads",
            "nvme_durability": "sync",
            "nvme_daily_write_bytes": "1 MiB",
        },
    )
    with kvstore.open(settings, ram_bytes="8 MiB") as store:
        fill(store, 300)
        assert store.flush()
        nvme = store.stats().nvme
        assert not nvme["io_uring"]
        assert 0 < nvme["written_today_bytes"] <= MiB
    records = read_directory(path).records
    assert set(records["codec"].tolist()) == {1}
    with kvstore.open(settings, ram_bytes="8 MiB", nvme_admission="priority") as store:
        fill(store, 4, model="another")
        assert store.flush()
    assert read_directory(path).blocks == len(records)


def test_every_bound_reaches_the_store() -> None:
    """Seen through what they bound, one by one, for the store does not show them."""
    with kvstore.open(ram_bytes="8 MiB", store_protected_bytes=2 * 8192) as store:
        chain = fill(store, 4).chain()
        retained = store.retain(chain, kvstore.Retention(priority=90, ttl_s=60.0))
        assert (retained.accepted, retained.refused) == (2, 2)
    with kvstore.open(ram_bytes="8 MiB", store_ttl_max_s="30s") as store:
        chain = fill(store, 4).chain()
        assert store.retain(chain, kvstore.Retention(priority=90, ttl_s=60.0)).clipped == 4


def test_settings_name_every_bound() -> None:
    assert StoreSettings().model_dump() == dataclasses.asdict(Bounds())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"ram_bytes": "12 potatoes"}, "ram_bytes = '12 potatoes': must be a size"),
        ({"ram_bytes": 0}, "ram_bytes = 0: must be a size"),
        ({"nvme_pat": "x"}, "nvme_pat: no such setting; did you mean nvme_path?"),
        ({"nvme_path": "x", "nvme_bytes": "900 TiB"}, "nvme_bytes = 900 TiB: more than the"),
    ],
)
def test_wrong_settings(overrides: dict[str, object], expected: str) -> None:
    with pytest.raises(SettingsError) as caught:
        kvstore.open(**overrides)
    assert str(caught.value).startswith(expected)


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryError, match="Not a directory"):
        kvstore.open(ram_bytes="1 MiB", nvme_path=tmp_path / "file" / "x", nvme_bytes="8 MiB")


def test_when_there_is_no_memory_the_directory_is_let_go(tmp_path: Path) -> None:
    where = {"nvme_path": tmp_path / "blocks", "nvme_bytes": "16 MiB"}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 512 * MiB, hard))
    try:
        with pytest.raises(OSError, match="Cannot allocate memory"):
            kvstore.open(ram_bytes="1 GiB", **where)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    kvstore.open(ram_bytes="1 MiB", **where).close()


def from_toml(path: Path) -> Settings:
    file = path.with_suffix(".toml")
    file.write_text(f'[nvme]\npath = "{path}"\ncapacity_bytes = "4 MiB"\n')
    return sources.load(config=file, environ={"KVSTORE_RAM__CAPACITY_BYTES": "8 MiB"})


def from_environment(path: Path) -> Settings:
    file = path.with_suffix(".toml")
    file.write_text(f'[nvme]\npath = "{path}"\n[ram]\ncapacity_bytes = "8 MiB"\n')
    return sources.load(config=file, environ={"KVSTORE_NVME__CAPACITY_BYTES": "4 MiB"})


def made(path: Path, capacity: str, blocks: int) -> dict[str, int]:
    with kvstore.open(ram_bytes="8 MiB", nvme_path=path, nvme_bytes=capacity) as store:
        fill(store, blocks)
    return sizes_of(path)


def sizes_of(path: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in path.iterdir()}


@pytest.mark.parametrize("capacity", ["16 MiB", "4000000"])
def test_a_directory_keeps_its_capacity_where_nobody_gives_one(
    capacity: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else is set, and on a disk without room for the default."""
    path = tmp_path / "blocks"
    before = made(path, capacity, 200)
    disk = os.statvfs(path)
    full = os.statvfs_result((*disk[:4], 0, *disk[5:]))  # f_bavail
    with monkeypatch.context() as patched:
        patched.setattr("os.statvfs", lambda _: full)
        kvstore.open(ram_bytes="8 MiB", nvme_path=path, nvme_codec="zstd").close()
        settings = override(None, {"nvme_path": path, "ram_bytes": "8 MiB"})
        kvstore.open(settings, nvme_driver="threads").close()
    assert sizes_of(path) == before
    assert read_directory(path).blocks == 200
    assert not caplog.records


@pytest.mark.parametrize("layer", [from_toml, from_environment])
def test_a_capacity_that_someone_gives_holds(
    layer: Callable[[Path], Settings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A smaller one drops blocks, and says how many, once."""
    path = tmp_path / "blocks"
    made(path, "16 MiB", 1000)
    kvstore.open(layer(path)).close()
    left = read_directory(path).blocks
    assert 0 < left < 1000
    (warned,) = (record.getMessage() for record in caplog.records)
    assert warned == (
        f"{path} was made for 16 MiB and is opened with 4 MiB: {1000 - left} blocks "
        f"({format_size((1000 - left) * 8192)}) are dropped"
    )
    caplog.clear()
    kvstore.open(layer(path)).close()
    kvstore.open(ram_bytes="8 MiB", nvme_path=path, nvme_bytes="3.5 MiB").close()
    kvstore.open(layer(path)).close()
    assert len(caplog.records) == 1  # of 3.5 MiB: what grows drops nothing


def test_a_directory_that_was_never_finished_gets_what_the_settings_say(tmp_path: Path) -> None:
    path = tmp_path / "blocks"
    made(path, "2 MiB", 0)
    os.truncate(path / "slab", 0)
    assert not has_tier(path)
    (path / "slab").unlink()
    assert not has_tier(path)

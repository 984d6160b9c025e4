"""Settings: every source, their order, and one clear line for whatever is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore import sources
from kvstore.errors import SettingsError
from kvstore.machine import free_disk_bytes, memory_bytes
from kvstore.quantities import counted, format_size, format_time, parse_size, parse_time
from kvstore.settings import GiB, MiB, Settings
from kvstore.sources import Given
from kvstore.specs import specs


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "kvstore.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [
        ("1 GiB", 1 << 30),
        ("500MB", 500_000_000),
        ("1.5 gib", 3 << 29),
        ("64kib", 65536),
        ("4096", 4096),
        (4096, 4096),
        (" 2 TB ", 2 * 10**12),
        ("9007199254740993", 9007199254740993),  # not a float on the way
    ],
)
def test_sizes(written: object, nbytes: int) -> None:
    assert parse_size(written) == nbytes


@pytest.mark.parametrize(
    "written",
    [
        *(
            "12 potatoes",
            "",
            "GiB",
            "-1 GiB",
            "1e9",
            "1 G",
            "nan",
            True,
            None,
            -5,
            float("inf"),
            [1],
        ),
        *("9" * 400 + ".0", "9" * 5000, 10**400),  # no float, no int is that large
    ],
)
def test_what_is_not_a_size(written: object) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(written)


def test_one_is_not_many() -> None:
    assert [counted(n, "block") for n in (0, 1, 2)] == ["0 blocks", "1 block", "2 blocks"]


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("2s", 2), ("500ms", 0.5), ("1h", 3600), ("1.5 min", 90), ("2m", 120), (0.25, 0.25), ("3", 3)],
)
def test_times(written: object, seconds: float) -> None:
    assert parse_time(written) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "written", ["5 bananas", "", "-1s", "1 month", True, None, "9" * 400, 10**400]
)
def test_what_is_not_a_time(written: object) -> None:
    with pytest.raises(ValueError, match="not a time"):
        parse_time(written)


def test_a_rendered_size_or_time_reads_back() -> None:
    for nbytes in (512, 1024, 3 << 29, 10 * GiB, 1 << 40):
        assert parse_size(format_size(nbytes)) == nbytes
    for seconds in (0.0, 0.001, 0.5, 1.0, 90.0, 7200.0, 172800.0):
        assert parse_time(format_time(seconds)) == pytest.approx(seconds)


def test_flags_beat_environment_beats_toml_beats_defaults(tmp_path: Path) -> None:
    config = toml(
        tmp_path,
        """
        [ram]
        capacity_bytes = "2 MiB"
        [nvme]
        codec = "zstd"
        durability = "sync"
        [store]
        deadline_s = "3s"
        """,
    )
    environ = {"KVSTORE_RAM__CAPACITY_BYTES": "3 MiB", "KVSTORE_NVME__CODEC": "raw"}
    flags = {"ram.capacity_bytes": Given("4 MiB", "--ram-bytes")}

    assert sources.load(config=config, environ={}).ram.capacity_bytes == 2 * MiB
    assert sources.load(config=config, environ=environ).ram.capacity_bytes == 3 * MiB
    settings = sources.load(flags, config=config, environ=environ)
    assert settings.ram.capacity_bytes == 4 * MiB  # flag
    assert settings.nvme.codec == "raw"  # environment
    assert settings.nvme.durability == "sync"  # file
    assert settings.store.deadline_s == 3.0  # file
    assert settings.engine == Settings().engine  # defaults


def test_which_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    (home / "kvstore").mkdir(parents=True)
    work.mkdir()
    monkeypatch.chdir(work)
    environ = {"XDG_CONFIG_HOME": str(home)}

    assert sources.find_config(None, environ) is None
    (home / "kvstore" / "config.toml").write_text("")
    assert sources.find_config(None, environ) == home / "kvstore" / "config.toml"
    (work / "kvstore.toml").write_text("")
    assert sources.find_config(None, environ) == Path("kvstore.toml")
    environ["KVSTORE_CONFIG"] = "/from/environment.toml"
    assert sources.find_config(None, environ) == Path("/from/environment.toml")
    assert sources.find_config(Path("asked.toml"), environ) == Path("asked.toml")


def refusal(tmp_path: Path, text: str) -> str:
    config = toml(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        sources.load(config=config, environ={})
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{config}: ")
    return message.removeprefix(f"{config}: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[ram", "not valid TOML: "),
        ("[rum]\ncapacity_bytes = 1", "rum: no such group; did you mean ram?"),
        ("ram = 3", "ram = 3: must be a table, [ram]"),
        (
            "[ram]\ncapacity = 1",
            "ram.capacity: no such setting; did you mean ram.capacity_bytes?",
        ),
        (
            '[ram]\ncapacity_bytes = "12 potatoes"',
            "ram.capacity_bytes = '12 potatoes': must be a size from 1 MiB to 64 TiB, "
            'such as "500MB" or "1 GiB"',
        ),
        ("[ram]\ncapacity_bytes = 0", "ram.capacity_bytes = 0: must be a size from 1 MiB"),
        ('[nvme]\ncodec = "gzip"', "nvme.codec = 'gzip': must be one of raw, zstd"),
        ("[nvme]\npath = 7", "nvme.path = 7: must be a path"),
        ("[engine]\nthreads = 2.5", "engine.threads = 2.5: must be a whole number from 1 to 1024"),
        ('[store]\ndeadline_s = "soon"', "store.deadline_s = 'soon': must be a time from 1 ms"),
        ("[tenant]\nsalt = 1234", "tenant.salt: must be a text"),  # a secret is not repeated
        ('[ram]\ncapacity_bytes = "60 TiB"', "ram.capacity_bytes = 60 TiB: more than the "),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line(
    tmp_path: Path, text: str, expected: str
) -> None:
    assert refusal(tmp_path, text).startswith(expected)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"absent\.toml: cannot be read: No such file"):
        sources.load(config=tmp_path / "absent.toml", environ={})
    (tmp_path / "bytes.toml").write_bytes(b'[tenant]\nsalt = "\xff"')
    with pytest.raises(SettingsError, match="not valid TOML"):
        sources.load(config=tmp_path / "bytes.toml", environ={})


def test_what_is_wrong_in_the_environment_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    home = {"XDG_CONFIG_HOME": str(tmp_path)}
    for name, value, expected in (
        ("KVSTORE_RAM__CAPACITY_BYTES", "0", "KVSTORE_RAM__CAPACITY_BYTES = '0': must be a size"),
        ("KVSTORE_RAM__CAPACITY", "1", "did you mean KVSTORE_RAM__CAPACITY_BYTES?"),
        ("KVSTORE_NVME_PATH", "/x", "did you mean KVSTORE_NVME__PATH?"),
    ):
        with pytest.raises(SettingsError) as caught:
            sources.load(environ={**home, name: value})
        assert expected in str(caught.value)
    kubernetes = {"KVSTORE_SERVICE_HOST": "10.0.0.1", "KVSTORE_PORT": "tcp://x"}
    empty = {"KVSTORE_NVME__PATH": ""}
    assert sources.load(environ={**home, **kubernetes, **empty}) == Settings()


def test_sizes_are_held_against_this_machine(tmp_path: Path) -> None:
    for key, limit in (
        ("ram.capacity_bytes", memory_bytes()),
        ("engine.hbm_bytes", memory_bytes()),
        ("nvme.capacity_bytes", free_disk_bytes(tmp_path)),
    ):
        flags = {
            "nvme.path": Given(tmp_path / "blocks", "--nvme-path"),
            key: Given(limit + 1024 * MiB, "--that-flag"),
        }
        with pytest.raises(SettingsError, match=r"^--that-flag = .*: more than the "):
            sources.merge(flags)


def test_a_directory_counts_what_it_holds_as_room(tmp_path: Path) -> None:
    before = free_disk_bytes(tmp_path / "not" / "yet")
    (tmp_path / "slab").write_bytes(bytes(64 * MiB))
    # Others write to this disk as well, so: most of the 64 MiB, not all.
    gained = free_disk_bytes(tmp_path) - free_disk_bytes(tmp_path / "not" / "yet")
    assert gained == pytest.approx(64 * MiB, abs=32 * MiB)
    assert before > 0


def test_overrides_of_the_library() -> None:
    base = sources.override(None, {"ram_bytes": "2 MiB", "nvme_codec": "zstd"})
    changed = sources.override(base, {"ram_bytes": 3 * MiB})
    assert (changed.ram.capacity_bytes, changed.nvme.codec) == (3 * MiB, "zstd")
    with pytest.raises(SettingsError, match=r"^ram_byte: no such setting; did you mean ram_bytes"):
        sources.override(None, {"ram_byte": 1})
    with pytest.raises(SettingsError, match=r"^nvme_bytes = '12 potatoes': must be a size"):
        sources.override(None, {"nvme_bytes": "12 potatoes"})


def test_there_are_few_settings_and_each_says_why() -> None:
    every = list(specs())
    assert len(every) < 49
    assert all(spec.reason.endswith(".") for spec in every)
    assert len({spec.name for spec in every}) == len(every)
    for spec in every:  # every default is within its own bounds, and reads back
        if spec.default != "not set":
            sources.merge({spec.key: Given(spec.default, "default")})


def test_the_salt_is_not_shown() -> None:
    assert "hush" not in repr(sources.override(None, {"tenant_salt": "hush"}))

"""Bad input: one clear line on stderr, nothing on stdout, exit status 2, never a traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import kvstore as library
from tests.cli.commands import Done, environment, fill, kvstore


def refused(done: Done, *expected: str) -> None:
    assert done.status == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    for text in expected:
        assert text in lines[0]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--ram-bytes", "12 potatoes"], "--ram-bytes = '12 potatoes': must be a size from 1 MiB"),
        (["--nvme-bytes", "0"], "--nvme-bytes = '0': must be a size from 1 MiB"),
        (["--nvme-path", "x", "--nvme-bytes", "900 TiB"], "--nvme-bytes = 900 TiB: more than the"),
        (["--ram-bytes", "60 TiB"], "--ram-bytes = 60 TiB: more than the"),
        (["--set", "nvme.codec=gzip"], "--set nvme.codec = 'gzip': must be one of raw, zstd"),
        (["--set", "nvme.kodec=raw"], "--set nvme.kodec: no such setting; did you mean nvme.codec"),
        (["--set", "nvme.codec"], "'nvme.codec' is not KEY=VALUE"),
        (["--config", "absent.toml"], "absent.toml: cannot be read: No such file or directory"),
        (["--config", "."], ".: cannot be read: Is a directory"),
        (["--ram-bytes", "9" * 400 + ".0"], "must be a size from 1 MiB"),
        (["--set", "store.deadline_s=" + "9" * 400], "must be a time from 1 ms"),
        (["--nvme-path", ""], "--nvme-path = '': must be a path"),
        (["--nvme-path", "~nobody-of-this-name/x"], "must be a path"),
        (["--colour"], "No such option '--colour' (see kvstore settings --help)"),
    ],
)
def test_settings(home: Path, args: list[str], expected: str) -> None:
    refused(kvstore(home, "settings", *args), expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[ram\ncapacity_bytes = 1", "kvstore.toml: not valid TOML: "),
        ("[ram]\nsize = 1", "kvstore.toml: ram.size: no such setting"),
        ('[ram]\ncapacity_bytes = "12 potatoes"', "kvstore.toml: ram.capacity_bytes = '12 pot"),
        ("[ram]\ncapacity_bytes = " + "9" * 400, "kvstore.toml: ram.capacity_bytes = "),
        ("[ram]\ncapacity_bytes = " + "9" * 5000, "kvstore.toml: not valid TOML: "),
        ("x = " + "[" * 5000, "kvstore.toml: not valid TOML: "),
        ('[nvme]\npath = "a\\u0000b"', "kvstore.toml: nvme.path = 'a\\x00b': must be a path"),
        ("[engine]\nblock_tokens = true", "engine.block_tokens = True: must be a whole number"),
    ],
)
def test_a_toml_file_in_the_working_directory(home: Path, text: str, expected: str) -> None:
    (home / "kvstore.toml").write_text(text)
    refused(kvstore(home, "ls"), expected)


def test_the_environment(home: Path) -> None:
    done = kvstore(home, "settings", KVSTORE_RAM__CAPACITY_BYTES="much")
    refused(done, "KVSTORE_RAM__CAPACITY_BYTES = 'much': must be a size")


def test_a_config_file_of_a_user_that_there_is_not(home: Path) -> None:
    done = kvstore(home, "settings", KVSTORE_CONFIG="~nobody-of-this-name/kvstore.toml")
    refused(done, "~nobody-of-this-name/kvstore.toml: cannot be read: No such file")


def test_an_unknown_command(home: Path) -> None:
    refused(kvstore(home, "generat"), "No such command 'generat'", "kvstore --help")


def test_what_cannot_be_a_model(here: Callable[..., Done], home: Path) -> None:
    (home / "notes.txt").write_text("not a model")
    (home / "empty").mkdir()
    (home / "bad.gguf").write_bytes(b"GGUF but not really")
    for model, expected in (
        ("nowhere", "there is no model at nowhere"),
        ("notes.txt", "neither a model folder nor a .gguf file"),
        ("empty", "empty"),
        ("bad.gguf", "bad.gguf"),
        ("~nobody-of-this-name/model", "there is no model at ~nobody-of-this-name/model"),
        ("smollm2/inner", "there is no model at"),
    ):
        refused(here("generate", "--model", model, "hello"), expected)
    refused(here("generate", "hello"), "which model?", "--model")


def test_what_cannot_be_a_prompt(here: Callable[..., Done], home: Path, model: Path) -> None:
    def generate(*args: str | Path) -> Done:
        return here("generate", "--model", model, *args)

    (home / "latin.txt").write_bytes(b"caf\xe9")
    refused(generate("x" * 20_000), "the prompt has 20000 tokens", "context of 16384")
    refused(generate("--hbm-bytes", "1 MiB", "x" * 5000), "the prompt has 5000 tokens", "hbm_bytes")
    refused(generate(""), "there is no prompt")
    refused(generate(b"caf\xe9".decode(errors="surrogateescape")), "not a text in UTF-8")
    refused(generate("--chat", b"\xe9".decode(errors="surrogateescape")), "not a text in UTF-8")
    refused(generate("--file", "absent.txt"), "absent.txt: cannot be read: No such file")
    refused(generate("--file", "latin.txt"), "latin.txt: not a text in UTF-8")
    refused(generate("--temperature", "-1", "hello"), "temperature must not be negative")
    refused(generate("--max-tokens", "many", "hello"), "'many' is not a valid integer")
    refused(generate("-n", "9", "hello"), "n is 9")


def test_a_directory_in_use_by_another_process(here: Callable[..., Done], tmp_path: Path) -> None:
    holder = (
        "import sys, kvstore\n"
        "with kvstore.open(ram_bytes='1 MiB', nvme_path=sys.argv[1], nvme_bytes='8 MiB'):\n"
        "    print('open', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    blocks = tmp_path / "blocks"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(blocks)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        for command in ("ls", "stat", "verify"):
            refused(here(command, blocks), f"{blocks} is in use by process {other.pid}")
        asked = ("--model", tmp_path, "--nvme-path", blocks, "--nvme-bytes", "8 MiB", "hello")
        refused(here("generate", *asked), f"{blocks} is in use by process {other.pid}")
    assert here("ls", blocks).status == 0


def test_a_directory_of_a_newer_format(here: Callable[..., Done], tmp_path: Path) -> None:
    blocks = tmp_path / "blocks"
    with library.open(ram_bytes="1 MiB", nvme_path=blocks, nvme_bytes="8 MiB") as store:
        fill(store, 3)
    format_file = blocks / "format"
    format_file.write_text(format_file.read_text().replace("format 1", "format 2"))
    before = {path.name: path.read_bytes() for path in blocks.iterdir()}
    asked = ("--model", tmp_path, "--nvme-path", blocks, "--nvme-bytes", "8 MiB", "hello")
    refused(here("generate", *asked), "newer kvstore (format 2")
    refused(here("verify", blocks), "newer kvstore (format 2")
    after = {path.name: path.read_bytes() for path in blocks.iterdir()}
    assert {**after, "lock": b""} == {**before, "lock": b""}


def test_directories_that_cannot_be_used(here: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "pictures").mkdir()
    for path, expected in (
        (tmp_path / "file" / "blocks", "Not a directory"),
        (tmp_path / "nowhere", "nowhere does not exist"),
        (tmp_path / "pictures", "is not a kvstore NVMe directory"),
    ):
        refused(here("ls", path), str(path), expected)
    for wrong in (tmp_path / "file" / "blocks", tmp_path / "file"):
        asked = ("--model", tmp_path, "--nvme-path", wrong, "--nvme-bytes", "8 MiB", "hello")
        refused(here("generate", *asked), str(wrong), "Not a directory")
    refused(here("stat"), "which store? give DIR")


def test_a_folder_of_something_else(here: Callable[..., Done], tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "one").write_text("")
    asked = ("--model", tmp_path, "--nvme-path", pictures, "--nvme-bytes", "8 MiB", "hello")
    refused(here("generate", *asked), f"name a new or empty folder, such as {pictures}/kvstore")
    assert [path.name for path in pictures.iterdir()] == ["one"]


def test_no_permission_on_the_directory(home: Path, tmp_path: Path) -> None:
    blocks = tmp_path / "blocks"
    with library.open(ram_bytes="1 MiB", nvme_path=blocks, nvme_bytes="8 MiB"):
        pass
    blocks.chmod(0)
    try:
        refused(as_somebody(home, tmp_path, "stat", blocks), f"no permission to use {blocks}")
        asked = as_somebody(home, tmp_path, "generate", "--model", blocks / "model", "hello")
        refused(asked, f"{blocks / 'model'} cannot be read: Permission denied")
    finally:
        blocks.chmod(0o700)


@pytest.mark.parametrize("name", ["slab", "records.mdb"])
def test_no_permission_on_a_file_is_no_damage(name: str, home: Path, tmp_path: Path) -> None:
    blocks = tmp_path / "blocks"
    with library.open(ram_bytes="1 MiB", nvme_path=blocks, nvme_bytes="8 MiB") as store:
        fill(store, 3)
    blocks.chmod(0o755)
    for path in blocks.iterdir():
        path.chmod(0o644)
    assert as_somebody(home, tmp_path, "verify", blocks).status == 0
    (blocks / name).chmod(0)
    for command in ("ls", "stat", "verify"):
        done = as_somebody(home, tmp_path, command, blocks)
        refused(done, f"no permission to use {blocks / name}")


def test_a_home_that_is_closed_or_missing_is_one_without_settings(
    home: Path, tmp_path: Path
) -> None:
    home.chmod(0)
    try:
        assert as_somebody(home, tmp_path, "settings").status == 0
    finally:
        home.chmod(0o700)
    assert as_somebody(None, tmp_path, "settings").status == 0
    refused(as_somebody(None, tmp_path, "chat"), "no home directory", "XDG_STATE_HOME")
    smollm2 = as_somebody(None, tmp_path, "generate", "--model", "smollm2", "hello")
    refused(smollm2, "no home directory", "XDG_CACHE_HOME")


def as_somebody(home: Path | None, tmp_path: Path, *args: str | Path) -> Done:
    """Run a command as a user without a name; root may open anything, so it gives up its rights."""
    # Our files may be closed to somebody, so they are read before; only two commands need torch.
    torch = "from kvstore.engine import sampling\n" * (args[0] in ("chat", "generate"))
    command = (
        "import os, signal, sys\n"
        "from kvstore.cli import console, conversation, main, model_package, running\n"
        f"{torch}"
        "from kvstore.tiers import nvme_verify\n"
        "from kvstore.cli import listing, ls, stat, target, verify\n"
        "from kvstore import sources\n"
        "if os.getuid() == 0:\n"
        "    os.setgroups([]), os.setgid(54321), os.setuid(54321)\n"
        "sys.exit(main.run(sys.argv[1:]))\n"
    )
    env = environment(home or tmp_path)
    if home is None:
        del env["HOME"]
    # The way to it must be open for the check to be about the directory itself.
    modes = {folder: folder.stat().st_mode for folder in (tmp_path, *tmp_path.parents)}
    closed = {folder: mode for folder, mode in modes.items() if not mode & 0o001}
    try:
        for folder, mode in closed.items():
            folder.chmod(mode | 0o001)
        done = subprocess.run(
            [sys.executable, "-c", command, *map(str, args)],
            capture_output=True,
            text=True,
            cwd="/",
            env=env,
            check=False,
        )
    finally:
        for folder, mode in closed.items():
            folder.chmod(mode)
    return Done(done.returncode, done.stdout, done.stderr)

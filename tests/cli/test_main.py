"""The command itself: help that is quick, statuses, and what becomes of an error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import kvstore as library
from kvstore.cli.main import cli
from tests.cli.commands import Done, environment, fill, kvstore

HEAVY = ("torch", "numpy", "pydantic", "rich", "lmdb", "transformers")


def python(home: Path, code: str, *args: str) -> Done:
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        cwd=home,
        env=environment(home),
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def test_help_imports_nothing_heavy(home: Path) -> None:
    code = (
        "import sys\n"
        "from kvstore.cli.main import run\n"
        "assert run(['--help']) == 0\n"
        f"sys.exit([name for name in {HEAVY} if name in sys.modules] or 0)\n"
    )
    done = python(home, code)
    assert done.stderr == ""
    assert all(name in done.stdout for name in cli.commands)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_help_of_a_command_has_an_example(here: Callable[..., Done], name: str) -> None:
    done = here(name, "--help")
    assert done.status == 0
    assert f"kvstore {name}" in done.stdout.partition("Options:")[0].partition("\n")[2]


def test_version(here: Callable[..., Done]) -> None:
    assert here("--version").stdout == f"kvstore, version {library.__version__}\n"


def test_help_says_who_tells_where_a_prompt_came_from(here: Callable[..., Done]) -> None:
    text = " ".join(here("generate", "--help").stdout.split())
    assert "Where the prompt came from is told on a terminal, and by --json" in text


def test_without_the_engine_extra(home: Path, model: Path) -> None:
    """`import torch` fails as it does where torch is not installed."""
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from kvstore.cli.main import run\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    advice = "this needs torch, which is not installed: pip install -e '.[engine]' in its clone"
    for command in (("generate", "hello"), ("chat",), ("demo",)):
        done = python(home, code, *command, "--model", str(model))
        assert done == Done(2, "", f"kvstore: {advice}\n")
    assert python(home, code, "settings").status == 0


def test_a_reader_that_leaves(home: Path) -> None:
    """As `kvstore settings | head -0`: no complaint."""
    with subprocess.Popen(
        [sys.executable, "-m", "kvstore", "settings"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(home),
    ) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.close()
        assert command.stderr.read() == b""
        assert command.wait() == 141


def test_threads_are_set_before_torch_reads_them(home: Path, model: Path) -> None:
    code = (
        "import os, sys\n"
        "os.environ['OMP_NUM_THREADS'] = '2'\n"
        "from kvstore.cli.main import run\n"
        "assert run(sys.argv[1:]) == 0\n"
        "import torch\n"
        "print(torch.get_num_threads(), file=sys.stderr)\n"
    )
    asked = ("--model", str(model), "--threads", "1", "--max-tokens", "1", "hello")
    done = python(home, code, "generate", *asked)
    assert (done.status, done.stderr) == (0, "1\n")


def test_settings_are_a_file_that_reads_back(here: Callable[..., Done], home: Path) -> None:
    changed = ("--ram-bytes", "3 MiB", "--set", "nvme.codec=zstd", "--set", "store.deadline_s=90ms")
    (home / "kvstore.toml").write_text("")
    shown = here("settings", *changed)
    assert shown.status == 0
    assert '\n# capacity_bytes = "10 GiB"\n' in shown.stdout  # nobody's: a directory keeps its own
    (home / "kvstore.toml").write_text(shown.stdout)
    assert here("settings").stdout == shown.stdout
    data = here("settings", "--json").data
    assert data["ram"]["capacity_bytes"] == 3 << 20
    assert (data["nvme"]["codec"], data["store"]["deadline_s"]) == ("zstd", 0.09)


def test_a_secret_is_not_shown_but_said(here: Callable[..., Done]) -> None:
    assert "not shown" not in here("settings").stdout
    secrets = ("--set", "tenant.salt=hush", "--set", "client.token=kvs_hush")
    for command in (("settings",), ("daemon", "--print-config")):
        shown = here(*command, *secrets)
        assert "hush" not in shown.stdout
        assert "\n# salt: set, not shown\n" in shown.stdout
        assert "\n# token: set, not shown\n" in shown.stdout
    data = here("settings", *secrets, "--json").data
    assert (data["tenant"]["salt"], data["client"]["token"]) == (None, None)


def test_flags_beat_environment_beats_toml(home: Path) -> None:
    """Once through real processes; every pair of sources is tested in test_settings.py."""
    (home / "kvstore.toml").write_text("[engine]\nmax_batch = 2\nblock_tokens = 2\nthreads = 2\n")
    done = kvstore(
        home,
        "settings",
        "--json",
        "--threads",
        "4",
        KVSTORE_ENGINE__THREADS="3",
        KVSTORE_ENGINE__BLOCK_TOKENS="3",
    )
    engine = done.data["engine"]
    assert (engine["max_batch"], engine["block_tokens"], engine["threads"]) == (2, 3, 4)


def test_an_error_of_the_machine_is_one_line(here: Callable[..., Done], tmp_path: Path) -> None:
    blocks = tmp_path / "blocks"
    with library.open(ram_bytes="1 MiB", nvme_path=blocks, nvme_bytes="8 MiB") as store:
        fill(store, 2)
    (blocks / "slab").unlink()
    (blocks / "slab").mkdir()
    done = here("verify", blocks)
    assert (done.status, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_what_the_terminal_cannot_show_is_escaped(home: Path) -> None:
    """A name that is not UTF-8, or an encoding with few characters, ends no command."""
    folder = home / "bl\u00f6cke"
    with library.open(ram_bytes="1 MiB", nvme_path=folder, nvme_bytes="8 MiB"):
        pass
    done = kvstore(home, "stat", "bl\u00f6cke", PYTHONIOENCODING="ascii")
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.startswith("bl\\xf6cke\n")

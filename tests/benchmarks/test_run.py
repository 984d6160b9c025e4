"""The benchmarks themselves, on sizes that say nothing: every store row runs end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.workers.lines import ROOT

ROWS = {
    "hashing": ["hashing 131,072 tokens, xxh3_128", "hashing 131,072 tokens, sha256"],
    "probe": ["probe of 1,000 keys, all present", "probe of 1,000 keys, none present"],
    "ram/128KiB": [
        "ram put 128 KiB",
        "ram get 128 KiB",
        "ram put 128 KiB, verified",
        "ram get 128 KiB, verified",
    ],
    "restart": ["restart with 2,000 blocks on NVMe"],
    "daemon/128KiB": ["daemon put 128 KiB", "daemon get 128 KiB"],
    "daemon/words": [
        "daemon acquire of 512 resident blocks",
        "daemon acquire of 512 resident blocks, their views, and release",
        "daemon probe of 1,000 keys",
    ],
    "daemon/tcp/128KiB": ["daemon put 128 KiB, over TCP", "daemon get 128 KiB, over TCP"],
}


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    command += ["--quick", "--dir", str(tmp_path), "--output", str(tmp_path / "results")]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tmp_path = tmp_path_factory.mktemp("benchmarks")
    done = run(tmp_path, *ROWS)
    assert done.returncode in (0, 1), done.stderr  # tiny sizes may well miss their bounds
    written: dict[str, Any] = json.loads((tmp_path / "results/partial/latest.json").read_text())
    return written


def test_every_row_that_was_asked_for_is_there(results: dict[str, Any]) -> None:
    assert [row["name"] for row in results["rows"]] == [n for names in ROWS.values() for n in names]
    assert results["unmeasured"] == []
    assert all(row["value"] > 0 for row in results["rows"])


def test_the_machine_is_named(results: dict[str, Any]) -> None:
    machine = results["machine"]
    assert results["effort"] == "quick"
    assert machine["cpu_count"] == os.cpu_count()
    assert machine["disk"]["file_system"]
    assert "numpy" in machine["versions"]


def test_a_name_that_does_not_exist_is_bad_input(tmp_path: Path) -> None:
    done = run(tmp_path, "rom")
    assert done.returncode == 2
    assert done.stderr.startswith("no benchmark is called 'rom'")
    assert not (tmp_path / "results").exists()


def test_a_peer_that_is_not_installed_is_skipped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_BENCH_LMCACHE_PYTHON", str(tmp_path / "nowhere"))
    done = run(tmp_path, "lmcache/2MiB", "daemon/lmcache/2MiB")
    assert done.returncode == 0
    for name in ("lmcache/2MiB", "daemon/lmcache/2MiB"):
        assert f"not measured {name}: lmcache is not installed: make bench-peers" in done.stdout


def test_a_peer_that_does_not_start_is_no_failure_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A Python without any of Mooncake's programs beside it.
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    (tmp_path / "mooncake_master").symlink_to("/bin/false")
    monkeypatch.setenv("KVSTORE_BENCH_MOONCAKE_PYTHON", str(python))
    done = run(tmp_path, "daemon/mooncake/2MiB")
    assert done.returncode == 0
    assert "Mooncake does not start: mooncake_master does not start: it said" in done.stdout

"""What is built from the tree, and what is built from the sdist, hold the whole package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = {".py", ".pyi", ".proto", ".cu", ".cuh", ".typed", ".md", ".html"}


def build(kind: str, tree: Path, into: Path) -> Path:
    code = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
    into.mkdir(exist_ok=True)
    command = [sys.executable, "-c", code, str(into)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (built,) = into.iterdir()
    return built


def package_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.startswith("kvstore/")}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The repository without what git does not hold; building writes into it."""
    copy = tmp_path / "tree"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "models")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
    return copy


def test_wheel_and_sdist_hold_every_file(tree: Path, tmp_path: Path) -> None:
    expected = {
        str((Path(folder) / name).relative_to(tree))
        for folder, _, names in os.walk(tree / "kvstore", followlinks=True)
        for name in names
        if Path(name).suffix in SHIPPED
    }
    sdist = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    from_tree = package_files(build("wheel", tree, tmp_path / "wheel"))
    from_sdist = package_files(build("wheel", unpacked, tmp_path / "wheel-from-sdist"))
    assert from_tree == from_sdist == expected

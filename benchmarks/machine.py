"""What the figures were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvstore.machine import memory_bytes

PACKAGES = ("numpy", "xxhash", "lmdb", "torch", "transformers")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ROOT = Path(__file__).parents[1]


def facts(directory: Path) -> dict[str, Any]:
    """CPU, memory, kernel, the disk under `directory`, versions, load, date, commit."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "kernel": platform.release(),
        "disk": _disk(directory),
        "load_average": list(os.getloadavg()),
        "threads": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "fio": _output(["fio", "--version"]),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _disk(directory: Path) -> dict[str, str]:
    """Device, file system and options of the mount that holds `directory`."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    here = directory.resolve()
    holding = [mount for mount in mounts if here.is_relative_to(mount[1])]
    device, _, kind, options, *_ = max(holding, key=lambda mount: len(mount[1]))
    return {"device": device, "file_system": kind, "options": options}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

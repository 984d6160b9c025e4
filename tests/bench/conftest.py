"""The CPU as a card, and one run over it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from kvstore.bench.benchmark import Bench
from kvstore.bench.sizes import TINY
from tests.bench.cpu_card import CpuCard
from tests.kernels.emulator import EmulatedRuntime


@pytest.fixture(scope="session")
def card(pytestconfig: pytest.Config) -> CpuCard:
    """Kernels are compiled once, and kept with those of the kernels' own tests."""
    if shutil.which("g++") is None:
        pytest.skip("kernels are emulated with g++, which is not there")
    assert pytestconfig.cache is not None
    return CpuCard(EmulatedRuntime(Path(pytestconfig.cache.mkdir("emulator"))))


@pytest.fixture
def bench(card: CpuCard, tmp_path: Path) -> Bench:
    return Bench(card, TINY, tmp_path)


@pytest.fixture
def o_direct(tmp_path: Path) -> None:
    """For what is not measured without."""
    path = tmp_path / "direct"
    path.touch()
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("temporary files are where O_DIRECT is refused")
    finally:
        path.unlink()

"""Where the tests of a kernel run it: here on the CPU, and on a CUDA device if there is one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.kernels.emulator import EmulatedRuntime


@pytest.fixture(scope="session")
def compiled(pytestconfig: pytest.Config) -> Path:
    """Folder of emulated kernels, kept between runs beside pytest's own cache."""
    if shutil.which("g++") is None:
        pytest.skip("kernels are emulated with g++, which is not there")
    assert pytestconfig.cache is not None
    return Path(pytestconfig.cache.mkdir("emulator"))


@pytest.fixture(params=[0, 1, 2], ids="order{}".format)
def emulated(request: pytest.FixtureRequest, compiled: Path) -> EmulatedRuntime:
    """A runtime for CPU tensors; tests run with each of three orders of threads and blocks."""
    return EmulatedRuntime(compiled, seed=request.param)

"""Where the tests of a kernel run it: here on the CPU, and on a CUDA device if there is one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from kvstore.kernels.cuda_module import CudaRuntime, Runtime
from tests.kernels.emulator import EmulatedRuntime


@pytest.fixture(autouse=True)
def _fresh_numbers() -> None:
    """Others in every run; a test that fails says which."""
    print(f"torch.manual_seed({torch.seed()})")


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


@pytest.fixture(params=["order0", "order1", "order2", pytest.param("cuda", marks=pytest.mark.gpu)])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    """As `emulated`, and the CUDA device: what holds here must hold there."""
    if request.param == "cuda":
        return CudaRuntime()
    return EmulatedRuntime(request.getfixturevalue("compiled"), seed=int(request.param[-1]))


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def any_runtime(request: pytest.FixtureRequest) -> Runtime:
    """As `runtime`, for kernels whose threads do not depend on one another: in one order."""
    if request.param == "cuda":
        return CudaRuntime()
    return EmulatedRuntime(request.getfixturevalue("compiled"), seed=1)

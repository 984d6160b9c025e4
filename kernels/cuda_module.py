"""Compiles the CUDA sources in csrc/ when they are first needed, and launches their kernels.

A kernel is named by its source and a C++ expression, `copy_pages<2, true>`; each is compiled
alone, for the device at hand, by NVRTC, and kept on disk. Nothing here is imported before
someone has a CUDA device; docs/adr/0050-kernels-proved-on-a-cpu.md says how it is tested
without one.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import tempfile
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from shutil import rmtree
from threading import Lock
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kvstore.errors import KernelError

SOURCES = Path(__file__).resolve().parent / "csrc"
# NVRTC fails when it is used for the first time by two threads at once.
_COMPILING = Lock()
# Compute capability: bfloat16, and copies to shared memory that are not waited for.
OLDEST = (8, 0)
OPTIONS = ("--std=c++17", "--generate-line-info")


class Rows(NamedTuple):
    """Rectangles of memory: where each begins, and from one row of any to its next."""

    addresses: Sequence[int]
    pitch_bytes: int


class Runtime(Protocol):
    """Where kernels run. There is the CUDA one here and, in the tests, one on the CPU."""

    @property
    def device_type(self) -> str:
        """Of the tensors that its kernels read and write, as torch calls it."""
        ...

    @property
    def block_shared_bytes(self) -> int:
        """Most shared memory that a thread block can have."""
        ...

    def launch(
        self,
        source: str,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[np.generic],
        shared_bytes: int = 0,
    ) -> None:
        """Start `kernel` of `source`; memory that it uses must live until it has run.

        `args` have the kernel's own types, pointers as numpy.uint64 (`address`). Raises
        KernelError where it cannot be compiled or loaded.
        """
        ...

    def resident_blocks(self, source: str, kernel: str, threads: int, shared_bytes: int) -> int:
        """How many thread blocks of `kernel` the device runs at once. Raises KernelError."""
        ...

    def copy_rows(self, target: Rows, source: Rows, width_bytes: int, rows: int) -> None:
        """Start a copy from each of `source` to its `target`: `rows` rows of `width_bytes`."""
        ...


def address(tensor: Tensor | None) -> np.uint64:
    """A tensor's memory as an argument; a null pointer for None."""
    return np.uint64(0 if tensor is None else tensor.data_ptr())


def runtime_of(tensor: Tensor) -> Runtime:
    """For a tensor on a CUDA device. Raises KernelError for one elsewhere."""
    if tensor.device.type != "cuda":
        raise KernelError(f"CUDA kernels need tensors on a CUDA device, not on {tensor.device}")
    return _runtime(tensor.device.index)


@cache
def _runtime(index: int) -> CudaRuntime:
    return CudaRuntime(index)


class _Stream(NamedTuple):
    """Torch's stream for CuPy, which asks a stream for its pointer and nothing else."""

    ptr: int


class CudaRuntime:
    """One CUDA device. Kernels run on torch's current stream of it, in the order of launches."""

    device_type = "cuda"

    def __init__(self, index: int = 0) -> None:
        """Raises KernelError for a device that is older than Ampere."""
        major, minor = torch.cuda.get_device_capability(index)
        if (major, minor) < OLDEST:
            raise KernelError(
                f"cuda:{index}, {torch.cuda.get_device_name(index)}, is sm_{major}{minor}: "
                f"CUDA kernels need sm_{OLDEST[0]}{OLDEST[1]} or newer"
            )
        self._index = index
        self._arch = f"sm_{major}{minor}"
        self._kernels: dict[tuple[str, str], Any] = {}
        self._resident: dict[tuple[str, str, int, int], int] = {}

    def launch(
        self,
        source: str,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[np.generic],
        shared_bytes: int = 0,
    ) -> None:
        with torch.cuda.device(self._index):
            stream = _Stream(torch.cuda.current_stream(self._index).cuda_stream)
            function = self._function(source, kernel, shared_bytes)
            function(grid, block, tuple(args), shared_mem=shared_bytes, stream=stream)

    @cached_property
    def block_shared_bytes(self) -> int:
        from cupy.cuda import runtime

        wanted = runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin
        return int(runtime.deviceGetAttribute(wanted, self._index))

    def resident_blocks(self, source: str, kernel: str, threads: int, shared_bytes: int) -> int:
        asked = source, kernel, threads, shared_bytes
        if asked not in self._resident:
            with torch.cuda.device(self._index):
                self._resident[asked] = self._fitting_blocks(*asked)
        return self._resident[asked]

    def copy_rows(self, target: Rows, source: Rows, width_bytes: int, rows: int) -> None:
        from cupy.cuda import runtime

        kind = runtime.memcpyDefault  # the driver sees from the addresses which memory is whose
        with torch.cuda.device(self._index):
            stream = torch.cuda.current_stream(self._index).cuda_stream
            for to, from_ in zip(target.addresses, source.addresses, strict=True):
                runtime.memcpy2DAsync(
                    to, target.pitch_bytes, from_, source.pitch_bytes,
                    width_bytes, rows, kind, stream,
                )  # fmt: skip

    def _fitting_blocks(self, source: str, kernel: str, threads: int, shared_bytes: int) -> int:
        from cupy.cuda import driver

        function = self._function(source, kernel, shared_bytes)
        each: int = driver.occupancyMaxActiveBlocksPerMultiprocessor(
            function.kernel.ptr, threads, shared_bytes
        )
        if not each:
            raise KernelError(f"{kernel} with {threads} threads does not fit into {self._arch}")
        return each * int(torch.cuda.get_device_properties(self._index).multi_processor_count)

    def _function(self, source: str, kernel: str, shared_bytes: int) -> Any:
        """Ready to be launched with so much dynamic shared memory."""
        function = self._kernels.get((source, kernel)) or self._load(source, kernel)
        # Less than 48 KiB unless one asks for more.
        if shared_bytes and shared_bytes > function.max_dynamic_shared_size_bytes:
            function.max_dynamic_shared_size_bytes = shared_bytes
        return function

    def _load(self, source: str, kernel: str) -> Any:
        import cupy

        path, symbol = cubin(source, kernel, self._arch)
        try:
            function = cupy.RawModule(path=str(path)).get_function(symbol)
            function.compile()
        except cupy.cuda.driver.CUDADriverError as error:
            raise KernelError(f"{kernel} for {self._arch} cannot be loaded: {error}") from error
        self._kernels[source, kernel] = function
        return function


def cubin(source: str, kernel: str, arch: str, folder: Path | None = None) -> tuple[Path, str]:
    """Machine code of one kernel for `arch` ("sm_90"), and its name in there.

    From `folder` (by default the user's cache, or where that cannot be written to, one of this
    process's own), or else compiled, which takes about a second and needs no device. Raises
    KernelError without CuPy or NVRTC, and for a source that does not compile.
    """
    folder = folder or cache_folder()
    headers = {path.name: path.read_text() for path in sorted(SOURCES.glob("*.cuh"))}
    text = (SOURCES / source).read_text()
    parts = [str(_nvrtc_version()), arch, kernel, text, *OPTIONS, *headers, *headers.values()]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    code, symbol = folder / f"{name}.cubin", folder / f"{name}.symbol"
    if not (code.exists() and symbol.exists()):
        with _COMPILING:
            binary, lowered = _compile(source, text, headers, kernel, arch)
        folder.mkdir(parents=True, exist_ok=True)
        _put(symbol, lowered.encode())  # first: who finds the code must find its name
        _put(code, binary)
    return code, symbol.read_text()


def _compile(
    source: str, text: str, headers: dict[str, str], kernel: str, arch: str
) -> tuple[bytes, str]:
    """Machine code and the symbol of `kernel` in it."""
    from cupy.cuda import nvrtc

    # NVRTC reads no file: the headers are given with the source.
    names = tuple(name.encode() for name in headers)
    texts = tuple(header.encode() for header in headers.values())
    program = nvrtc.createProgram(text, source, texts, names)
    try:
        nvrtc.addNameExpression(program, kernel)
        try:
            nvrtc.compileProgram(program, (*OPTIONS, f"--gpu-architecture={arch}"))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise KernelError(f"{kernel} of {source} for {arch}: {error}\n{log}") from error
        return nvrtc.getCUBIN(program), nvrtc.getLoweredName(program, kernel)
    finally:
        nvrtc.destroyProgram(program)


def _nvrtc_version() -> tuple[int, int]:
    """Raises KernelError with what to install."""
    try:
        from cupy.cuda import nvrtc
    except ImportError as error:
        raise KernelError(
            "CUDA kernels need CuPy: pip install 'kvstore[cuda13]', or cuda12 for older drivers"
        ) from error
    try:
        version: tuple[int, int] = nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:  # according to who looked for it
        raise KernelError(
            "CUDA kernels are compiled by NVRTC: pip install nvidia-cuda-nvrtc "
            f"of your CUDA version ({error})"
        ) from error
    return version


def cache_folder() -> Path:
    """Where compiled kernels are kept. One that nobody else can write to: they are run."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "kvstore" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # read-only, full, not ours; without a home
        return _own_folder()
    return folder


@cache
def _own_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="kvstore-kernels-"))
    atexit.register(rmtree, folder, ignore_errors=True)
    return folder


def _put(path: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all."""
    handle, scratch = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.replace(scratch, path)

"""Runs kernels of kernels/csrc on the CPU: the same sources, compiled by g++.

See emulator.h for what is emulated and what is checked. A kernel's pointers are those of CPU
tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvstore.kernels.block_copy_dma import MAX_PITCH_BYTES
from kvstore.kernels.cuda_module import Rows

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels" / "csrc"
# Contraction: the device's compiler fuses a multiplication and an addition as well.
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-fno-gnu-unique", "-w"),
    *("-ffp-contract=fast", "-DKVSTORE_EMULATED", f"-I{HERE}"),
)
# What hardware would not forgive is checked; emulator.cpp has the handlers.
CHECKS = ("-fvisibility=hidden", "-fsanitize=alignment,bounds,null")
# Reading it is most of what compiling a kernel takes, so it is done once.
PREPARED = "emulator_cuda.h"


class EmulatorError(Exception):
    """A kernel did what a GPU would not survive, or would only survive by luck."""


class EmulatedRuntime:
    """What `kernels/cuda_module.py` calls a runtime, for tensors on the CPU.

    Compiled kernels are kept in `folder`, by the hash of all that goes into them. `seed`
    chooses the order of blocks and threads; one test should run with several.
    """

    device_type = "cpu"

    block_shared_bytes = 227 << 10  # as on compute capability 9.0

    def __init__(self, folder: Path, seed: int = 0, sources: Path = SOURCES) -> None:
        self.folder = folder
        self.seed = seed
        self.sources = sources

    def launch(
        self,
        source: str,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[np.generic],
        shared_bytes: int = 0,
    ) -> None:
        """As `Runtime.launch`; the kernel has run when it returns. Raises EmulatorError."""
        entry = _entry(self.folder, self.sources / source, kernel)
        values = [np.asarray(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        sizes = (ctypes.c_size_t * len(values))(*(value.nbytes for value in values))
        ones = (1, 1, 1)
        shape = (*(*grid, *ones)[:3], *(*block, *ones)[:3], shared_bytes, self.seed)
        fault = entry((ctypes.c_uint * 8)(*shape), pointers, sizes, len(values))
        if fault:
            raise EmulatorError(f"{kernel}: {fault.decode()}")

    def resident_blocks(self, source: str, kernel: str, threads: int, shared_bytes: int) -> int:
        return 3  # what runs at once, one after another

    def copy_rows(self, target: Rows, source: Rows, width_bytes: int, rows: int) -> None:
        pitches = target.pitch_bytes, source.pitch_bytes
        if not 0 < width_bytes <= min(pitches) <= max(pitches) <= MAX_PITCH_BYTES:
            raise EmulatorError(f"rows of {width_bytes} bytes, {target} from {source}")
        for to, from_ in zip(target.addresses, source.addresses, strict=True):
            for row in range(rows):
                there, here = to + row * target.pitch_bytes, from_ + row * source.pitch_bytes
                ctypes.memmove(there, here, width_bytes)


def fenced(tensor: Tensor) -> Tensor:
    """A copy that ends where memory ends: what reads or writes beyond it is a fault."""
    page = mmap.PAGESIZE
    nbytes = tensor.numel() * tensor.itemsize
    inside = -(-nbytes // page) * page
    memory = mmap.mmap(-1, inside + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + inside), page, 0):
        raise OSError("mprotect")
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=inside - nbytes)
    return flat.view(tensor.dtype).view(tensor.shape).copy_(tensor)


@cache
def _entry(folder: Path, source: Path, kernel: str) -> Any:
    library = ctypes.PyDLL(str(_compiled(folder, source, kernel)))
    entry = library.start
    entry.restype = ctypes.c_char_p
    entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return entry


def _compiled(folder: Path, source: Path, kernel: str) -> Path:
    """The shared object of one kernel, compiled unless it is there."""
    program = f"""
        #include "{PREPARED}"
        #include "{source.name}"
        extern "C" __attribute__((visibility("default"))) const char* start(
            const unsigned* shape, void** arguments, const size_t* sizes, size_t count) {{
          return emulator::start({kernel}, shape, arguments, sizes, count);
        }}
    """
    own = [HERE / "emulator.cpp", *sorted(HERE.glob("*.h"))]
    emulator = _library(folder, own[0].read_text(), own, (), ())
    header = ("-x", "c++-header", str(HERE / PREPARED))
    prepared = folder / f"{_name('', own)}-headers" / f"{PREPARED}.gch"
    if not prepared.exists():
        prepared.parent.mkdir(exist_ok=True)
        _make(prepared, "g++", *FLAGS, *CHECKS, *header)
    used = [*own, *sorted(source.parent.glob("*.cu*"))]
    options = (f"-I{prepared.parent}", *CHECKS, f"-I{source.parent}")
    return _library(folder, program, used, options, (str(emulator),))


def _library(
    folder: Path, program: str, used: Sequence[Path], options: Sequence[str], needs: Sequence[str]
) -> Path:
    """The shared object of a program, with those that it needs beside it."""
    library = folder / f"{_name(program, used)}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unit = Path(scratch) / "unit.o"
        _make(unit, "g++", *options, *FLAGS, "-x", "c++", "-c", "-", program=program)
        link = ("-shared", f"-Wl,-z,defs,-soname,{library.name},-rpath,$ORIGIN")
        _make(library, "g++", *link, str(unit), *needs)  # and not the sanitizers' library
    return library


def _name(program: str, used: Sequence[Path]) -> str:
    """By the hash of all that goes into it."""
    parts = [program, *FLAGS, *CHECKS, *(path.read_text() for path in used)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _make(target: Path, *command: str, program: str = "") -> None:
    """Run a command that makes `target`, which is seen whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        done = subprocess.run(
            [*command, "-o", str(made)], input=program, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")
        os.replace(made, target)

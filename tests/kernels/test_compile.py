"""Every kernel that a launcher can ask for compiles, for all devices that we support."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
import pytest
import torch

from kvstore.errors import KernelError
from kvstore.kernels import cuda_module, paged_attention_cuda, write_kv_cuda
from kvstore.kernels.block_copy_cuda import KernelCopies
from kvstore.kernels.cuda_module import Rows, cache_folder, cubin
from kvstore.kernels.paged_tensors import PagedTensors, paged

ARCHS = ("sm_80", "sm_90")
WIDE = (torch.float32, torch.bfloat16, torch.float16)
NARROW = (torch.int8, torch.float8_e4m3fn)


class AskedRuntime:
    """Remembers what is to be launched, and leaves it at that."""

    device_type = "cpu"
    block_shared_bytes = 227 << 10

    def __init__(self) -> None:
        self.asked: set[tuple[str, str]] = set()

    def launch(
        self,
        source: str,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[np.generic],
        shared_bytes: int = 0,
    ) -> None:
        self.asked.add((source, kernel))

    def resident_blocks(self, source: str, kernel: str, threads: int, shared_bytes: int) -> int:
        return 1

    def copy_rows(self, target: Rows, source: Rows, width_bytes: int, rows: int) -> None:
        raise NotImplementedError


def ask_copies(runtime: AskedRuntime) -> None:
    """Of all conversions, and of rows whose length allows each width of access."""
    conversions = [(own, own) for own in (*WIDE, *NARROW)]
    conversions += [(own, stored) for own in WIDE for stored in (*WIDE, *NARROW) if own != stored]
    for (own, stored), head_dim in product(conversions, (1, 2, 4, 8, 16)):
        pages = paged(torch.zeros(1, 1, 2, 16, head_dim).to(own), 16)
        copies = KernelCopies(pages, 16, dtype=stored, runtime=runtime)
        buffer = torch.zeros(copies.format.head_bytes, dtype=torch.uint8)
        copies.copy_out([0], [buffer])
        copies.copy_in([0], [buffer])


def ask_attention(runtime: AskedRuntime) -> None:
    module = paged_attention_cuda
    for kind, query_kind, head_dim in product(
        module.KV_DTYPES, module.QUERY_DTYPES, module.HEAD_DIMS
    ):
        kv = torch.zeros(1, 1, 2, 16, head_dim).to(kind)
        query = torch.zeros(1, 1, head_dim, dtype=query_kind)
        one = torch.ones(1, dtype=torch.int32)
        module.decode(
            query, kv, 0, one[:, None], one, 16, torch.empty_like(query),
            module.DecodeWorkspace(1, 1, head_dim, "cpu"),
            torch.ones(1, 1, 2) if kind in NARROW else None, runtime,
        )  # fmt: skip


def ask_writes(runtime: AskedRuntime) -> None:
    module = write_kv_cuda
    for kind, new, head_dim in product(module.KV_DTYPES, module.DTYPES, module.HEAD_DIMS):
        kv = torch.zeros(1, 1, 2, 16, head_dim).to(kind)
        key = torch.zeros(1, 1, head_dim, dtype=new)
        scales = torch.ones(1, 1, 2) if kind in NARROW else None
        slots = torch.zeros(1, dtype=torch.int64)
        module.write_kv(key, key, kv, 0, slots, None, scales, runtime)


@pytest.fixture(scope="module")
def asked() -> set[tuple[str, str]]:
    """Source and name of every kernel."""
    runtime = AskedRuntime()
    ask_copies(runtime)
    ask_attention(runtime)
    ask_writes(runtime)
    return runtime.asked


@pytest.fixture(scope="module")
def every_core() -> Iterator[Pool]:
    """NVRTC uses one of them, and compiling takes most of this folder's time."""
    with get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        yield pool
        pool.close()
        pool.join()


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles(
    arch: str, asked: set[tuple[str, str]], every_core: Pool, pytestconfig: pytest.Config
) -> None:
    """All for the newest; for others one of each combination of types, which decide on the
    instructions, while sizes do not.
    """
    if arch != ARCHS[-1]:
        of_types = {re.sub(r"\b\d+\b", "", name): (source, name) for source, name in sorted(asked)}
        asked = set(of_types.values())
    assert pytestconfig.cache is not None
    folder = Path(pytestconfig.cache.mkdir("cubins"))
    made = every_core.starmap(cubin, ((*kernel, arch, folder) for kernel in sorted(asked)), 1)
    assert len(made) == len(asked) > 20
    for path, symbol in made:
        code = path.read_bytes()
        assert code.startswith(b"\x7fELF")
        assert symbol.encode() in code


def test_the_launchers_ask_for_every_kernel_that_there_is(asked: set[tuple[str, str]]) -> None:
    there = {
        (path.name, name)
        for path in cuda_module.SOURCES.glob("*.cu")
        for name in re.findall(r"__global__ [^;{]*?(\w+)\(const", path.read_text())
    }
    assert len(there) >= 6
    assert {(source, kernel.partition("<")[0]) for source, kernel in asked} == there


def test_a_kernel_is_compiled_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "csrc"
    sources.mkdir()
    monkeypatch.setattr(cuda_module, "SOURCES", sources)
    header, source = sources / "small.cuh", sources / "small.cu"
    header.write_text("constexpr int N = 1;")
    source.write_text(
        '#include "small.cuh"\ntemplate <int I> __global__ void f(int* x) { *x = I + N; }'
    )

    first, symbol = cubin("small.cu", "f<3>", "sm_90", tmp_path / "cache")
    assert symbol == "_Z1fILi3EEvPi"
    first.write_bytes(b"found again")
    assert cubin("small.cu", "f<3>", "sm_90", tmp_path / "cache") == (first, symbol)
    assert cubin("small.cu", "f<4>", "sm_90", tmp_path / "cache")[0] != first
    assert cubin("small.cu", "f<3>", "sm_80", tmp_path / "cache")[0] != first
    header.write_text("constexpr int N = 2;")
    assert cubin("small.cu", "f<3>", "sm_90", tmp_path / "cache")[0] != first
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".cubin", ".symbol"}


@pytest.mark.parametrize("suffix", [".cubin", ".symbol"])
def test_half_of_what_was_kept_is_made_again(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_module, "SOURCES", tmp_path)
    (tmp_path / "small.cu").write_text("__global__ void f(int* x) { *x = 1; }")
    code, symbol = cubin("small.cu", "f", "sm_90", tmp_path / "cache")
    code.with_suffix(suffix).unlink()
    assert cubin("small.cu", "f", "sm_90", tmp_path / "cache") == (code, symbol)
    assert code.read_bytes().startswith(b"\x7fELF")


def test_kernels_are_kept_in_the_user_s_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "kvstore" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert cache_folder() == tmp_path / "other" / "kvstore" / "kernels"


def test_where_nothing_can_be_kept_kernels_live_as_long_as_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    # Nobody, root neither, can make a file there.
    for folder in ("/proc/self", str(tmp_path / "file")):
        monkeypatch.setenv("XDG_CACHE_HOME", folder)
        own = cache_folder()
        assert own == cache_folder()
        assert own.parent == Path(tempfile.gettempdir())
        assert own.stat().st_mode & 0o77 == 0


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder().parent == Path(tempfile.gettempdir())


def test_what_does_not_compile_is_said_with_the_compiler_s_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_module, "SOURCES", tmp_path)
    (tmp_path / "wrong.cu").write_text("__global__ void f(int* x) { *y = 1; }")
    with pytest.raises(KernelError, match=r'wrong.cu.*sm_90(.|\n)*identifier "y" is undefined'):
        cubin("wrong.cu", "f", "sm_90", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_without_cupy_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(KernelError, match=r"pip install 'kvstore\[cuda13\]'"):
        cubin("block_copy.cu", "copy_pages<unsigned, 4, true>", "sm_90", tmp_path)


def test_tensors_elsewhere_than_on_a_cuda_device_are_refused() -> None:
    pages: PagedTensors = paged(torch.zeros(1, 1, 2, 16, 8), 16)
    with pytest.raises(KernelError, match="not on cpu"):
        KernelCopies(pages, 16)


def test_devices_that_are_too_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.raises(KernelError, match=r"cuda:1, Tesla T4, is sm_75: .* need sm_80"):
        cuda_module.CudaRuntime(1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    cuda_module.CudaRuntime(1)

"""The emulator runs kernels as a GPU does, and sees what a GPU would not forgive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kvstore.kernels.cuda_module import address
from tests.kernels.emulator import EmulatedRuntime, EmulatorError, fenced

SOURCE = """
#include "common.cuh"

extern "C" __global__ void reversed_sums(const float* in, float* out, int fault) {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  __shared__ float own[64];
  float* shared = reinterpret_cast<float*>(dynamic_shared);
  int i = threadIdx.x, there = blockIdx.x * 64 + i;
  own[i] = in[there];
  if (fault != 1) __syncthreads();
  shared[i] = own[63 - i];
  if (fault == 2 && i == 3) return;
  if (fault == 3 && i < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (fault == 4) *reinterpret_cast<float4*>(out + 1) = make_float4(0, 0, 0, 0);
  if (fault == 5) shared[i + 1] = 0;
  if (fault == 6) own[i + 1] = 0;
  if (fault == 7 && i < 7) __shfl_sync(0xffffffff, i, 0);
  if (fault == 8) __shfl_sync(i % 2 ? 0xaaaaaaaa : 0x55555555, i, 0);
  if (fault == 9) own[i] = in[512 + i % 7 - 4];
  out[there] = shared[i] + warp_sum(own[i]);
}

extern "C" __global__ void staged(const float* in, float* out, int fault) {
  __shared__ __align__(16) float tile[2][128];
  float sum = 0;
  copy_async(&tile[0][4 * threadIdx.x], in + 4 * threadIdx.x);
  copy_async_commit();
  for (int i = 0; i < 4; ++i) {
    const float* next = in + 128 * (i + 1) + 4 * threadIdx.x;
    if (i < 3) copy_async(&tile[(i + 1) % 2][4 * threadIdx.x], next);
    copy_async_commit();
    if (fault == 1) copy_async_wait<2>(); else copy_async_wait<1>();
    if (fault != 3) __syncthreads();
    for (int j = 0; j < 4; ++j) sum += tile[i % 2][(4 * (31 - threadIdx.x) + j)];
    if (fault != 2) __syncthreads();
  }
  if (fault != 4) copy_async_wait<0>();
  out[threadIdx.x] = sum;
}

extern "C" __global__ void largest(const float* in, float* out, int fault) {
  __shared__ float of_warps[2];
  for (int i = 0; i < 4; ++i) {
    float value = warp_max(in[64 * i + threadIdx.x]);
    if (fault == 0) __syncthreads();
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
    __syncthreads();
    out[4 * threadIdx.x + i] = fmaxf(of_warps[0], of_warps[1]);
  }
}

extern "C" __global__ void ballots(const int* in, unsigned* out, int* total) {
  unsigned odd = __ballot_sync(0xffffffff, in[threadIdx.x] & 1);
  int low = __shfl_up_sync(0xffffffff, in[threadIdx.x], 1, 8);
  if (threadIdx.x % 32 < 16) low += __shfl_xor_sync(0xffff, low, 4);
  out[2 * threadIdx.x] = odd;
  out[2 * threadIdx.x + 1] = low;
  atomicAdd(total, in[threadIdx.x]);
}
"""


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    csrc = Path(__file__).parents[2] / "kernels" / "csrc"
    (tmp_path / "common.cuh").write_text((csrc / "common.cuh").read_text())
    (tmp_path / "small.cu").write_text(SOURCE)
    return tmp_path


def launch(
    emulated: EmulatedRuntime, sources: Path, kernel: str, fault: int, blocks: int, threads: int
) -> tuple[Tensor, Tensor]:
    here = EmulatedRuntime(emulated.folder, emulated.seed, sources)
    source = fenced(torch.arange(512.0))
    out = torch.full((blocks * threads,), torch.nan)
    args: list[np.generic] = [address(source), address(out), np.int32(fault)]
    here.launch("small.cu", kernel, (blocks,), (threads,), args, 256)
    return source, out


def test_barriers_shared_memory_and_shuffles(emulated: EmulatedRuntime, sources: Path) -> None:
    source, out = launch(emulated, sources, "reversed_sums", 0, 4, 64)
    used = source[:256].view(4, 64)
    sums = used.view(4, 2, 32).sum(2).repeat_interleave(32, 1)
    assert torch.equal(out, (used.flip(1) + sums).flatten())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (2, "waits for threads that returned"),
        (3, "barriers in lines"),
        (4, "misaligned"),
        (5, "beyond the 256 bytes of dynamic shared memory"),
        (6, "index 64 is out of bounds"),
        (7, "a warp waits for threads"),
        (8, "from lane 0, which takes no part"),
        (9, "no memory at address"),
    ],
)
def test_faults(emulated: EmulatedRuntime, sources: Path, fault: int, message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        launch(emulated, sources, "reversed_sums", fault, 4, 64)
    test_barriers_shared_memory_and_shuffles(emulated, sources)


def test_asynchronous_copies(emulated: EmulatedRuntime, sources: Path) -> None:
    source, out = launch(emulated, sources, "staged", 0, 1, 32)
    assert torch.equal(out, source.view(4, 32, 4).sum((0, 2)).flip(0))


def test_a_thread_waits_for_its_copies(emulated: EmulatedRuntime, sources: Path) -> None:
    source, out = launch(emulated, sources, "staged", 4, 1, 32)  # the last groups are empty
    assert torch.equal(out, source.view(4, 32, 4).sum((0, 2)).flip(0))


@pytest.mark.parametrize("fault", [1, 2, 3])
def test_some_order_shows_a_missing_barrier_or_wait(
    compiled: Path, sources: Path, fault: int
) -> None:
    def right(order: int) -> bool:
        source, out = launch(EmulatedRuntime(compiled, order), sources, "staged", fault, 1, 32)
        return torch.equal(out, source.view(4, 32, 4).sum((0, 2)).flip(0))

    assert not all(right(order) for order in range(3))


@pytest.mark.parametrize("fault", [0, 1])
def test_a_warp_may_run_ahead_of_another_up_to_a_barrier(
    compiled: Path, sources: Path, fault: int
) -> None:
    def right(order: int) -> bool:
        here = EmulatedRuntime(compiled, order, sources)
        source, out = -torch.arange(256.0), torch.zeros(64, 4)
        args: list[np.generic] = [address(source), address(out), np.int32(fault)]
        here.launch("small.cu", "largest", (1,), (64,), args)
        return torch.equal(out, source[::64].expand(64, 4))

    assert all(right(order) for order in range(3)) == (fault == 0)


def test_ballots_and_parts_of_warps(emulated: EmulatedRuntime, sources: Path) -> None:
    here = EmulatedRuntime(emulated.folder, emulated.seed, sources)
    values = torch.randint(0, 100, (64,), dtype=torch.int32)
    out, total = torch.zeros(128, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    args = [address(tensor) for tensor in (values, out, total)]
    here.launch("small.cu", "ballots", (1,), (64,), args)
    odd = [sum(int(v & 1) << lane for lane, v in enumerate(warp)) for warp in values.view(2, 32)]
    assert [int(x) & 0xFFFFFFFF for x in out[::64]] == odd
    low = torch.where(torch.arange(64) % 8 == 0, values, values.roll(1)).view(2, 2, 16)
    low[:, 0] += low[:, 0].view(2, 2, 2, 4).flip(2).reshape(2, 16)
    assert torch.equal(out[1::2], low.flatten())
    assert total.item() == values.sum()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([np.uint64(0), np.uint64(0)], "2 arguments, and the kernel takes 3"),
        ([np.uint64(0), np.uint64(0), np.int64(0)], "argument 2 has 8 bytes"),
        ([np.uint64(0), np.uint64(0), np.int32(0)], "null address|no memory at"),
    ],
)
def test_arguments(
    emulated: EmulatedRuntime, sources: Path, args: list[np.generic], message: str
) -> None:
    here = EmulatedRuntime(emulated.folder, emulated.seed, sources)
    with pytest.raises(EmulatorError, match=message):
        here.launch("small.cu", "reversed_sums", (1,), (64,), args)

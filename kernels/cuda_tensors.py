"""What launchers ask of tensors before a kernel sees their addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.errors import KernelError
from kvstore.kernels.cuda_module import Runtime

# The types of csrc/common.cuh.
ELEMENTS = {
    torch.bfloat16: "Bfloat16",
    torch.float16: "Half",
    torch.float32: "float",
    torch.float8_e4m3fn: "Fp8",
    torch.int8: "Int8",
}
# Those of attention and of what writes for it.
HEAD_DIMS = (64, 80, 96, 128, 256)
# Widest access of a thread.
ALIGNMENT_BYTES = 16


def element_name(tensor: Tensor) -> str:
    """What kernels call the dtype of a tensor."""
    return ELEMENTS[tensor.dtype]


def check(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    dense: int | None = None,
) -> None:
    """Raises KernelError unless the tensor is what a kernel takes for it.

    Its last `dense` dimensions must follow one another without gaps (None: all of them).
    """
    if tensor.shape != torch.Size(shape):
        raise KernelError(f"{name} is {list(tensor.shape)}, not {list(shape)}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise KernelError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, not {wanted}")
    if tensor.device != device:
        raise KernelError(f"{name} is on {tensor.device}, not on {device}")
    dense = tensor.dim() if dense is None else dense
    first = (0,) * (tensor.dim() - dense)
    if tensor.numel() and not tensor[first].is_contiguous():
        raise KernelError(f"{name} with strides {list(tensor.stride())} does not lie densely")


def check_aligned(name: str, tensor: Tensor) -> None:
    """Raises KernelError unless all its last dimensions begin at multiples of 16 bytes."""
    steps = [stride * tensor.element_size() for stride in tensor.stride()[:-1]]
    if any(place % ALIGNMENT_BYTES for place in (tensor.data_ptr(), *steps)):
        raise KernelError(f"{name} has rows that do not begin at multiples of 16 bytes")


def check_kv(kv: Tensor, layer: int, dtypes: Sequence[torch.dtype], runtime: Runtime) -> None:
    """Raises KernelError unless `kv` is the HBM tier's tensor, on a device of `runtime`."""
    if kv.dim() != 5 or kv.device.type != runtime.device_type:
        raise KernelError(
            f"kv is {list(kv.shape)} on {kv.device}, not [kv_heads, layers, 2, slots, head_dim] "
            f"on a {runtime.device_type} device"
        )
    check("kv", kv, (*kv.shape[:2], 2, *kv.shape[3:]), dtypes, kv.device)
    check_aligned("kv", kv)
    if kv.shape[4] not in HEAD_DIMS:
        raise KernelError(f"heads of {kv.shape[4]} elements; {HEAD_DIMS} are supported")
    if not 0 <= layer < kv.shape[1]:
        raise KernelError(f"there is no layer {layer} of {kv.shape[1]}")


def check_scales(scales: Tensor | None, kv: Tensor) -> None:
    """Raises KernelError unless KV of 8 bits, and no other, has scales [kv_heads, layers, 2]."""
    if (kv.element_size() == 1) != (scales is not None):
        raise KernelError(f"KV of {kv.dtype} with{'out' if scales is None else ''} scales")
    if scales is not None:
        check("scales", scales, kv.shape[:3], (torch.float32,), kv.device)

"""A digest of a model's weights in memory that reads a little of every large tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

WHOLE_BYTES = 64 << 10  # tensors up to here are read whole
SAMPLES = 16  # of a larger one, this many pieces spread evenly
SAMPLE_BYTES = 1024


def weights_fingerprint(text: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hex sha256 over `text` and every tensor's name, shape, dtype and sampled bytes.

    Milliseconds for a model of a few hundred tensors. Training steps, merged adapters and
    converted dtypes change every large matrix all over, and are seen; a change of a few
    elements of a matrix of more than 64 KiB may not be.
    """
    digest = hashlib.sha256(text.encode())
    samples: dict[torch.device, list[Tensor]] = {}
    for name, tensor in tensors:
        digest.update(f"\0{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        samples.setdefault(tensor.device, []).append(_sample(tensor))
    for pieces in samples.values():
        # One copy from each device, not one for each tensor.
        digest.update(torch.cat(pieces).cpu().numpy().tobytes())
    return digest.hexdigest()


def _sample(tensor: Tensor) -> Tensor:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.numel() <= WHOLE_BYTES:
        return raw
    stride = (raw.numel() - SAMPLE_BYTES) // (SAMPLES - 1)
    return raw.as_strided((SAMPLES, SAMPLE_BYTES), (stride, 1), raw.storage_offset()).reshape(-1)

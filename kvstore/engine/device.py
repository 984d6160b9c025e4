"""What an engine gets from the device that it computes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor

from kvstore.engine.attention import HostAttention
from kvstore.engine.forward import Forward
from kvstore.engine.hbm_size import CPU_BYTES
from kvstore.engine.model import Decoder
from kvstore.layout import BlockLayout
from kvstore.tiers.hbm import HbmTier
from kvstore.verbs import Store

# Told how many seconds something took, at once or later.
Observe = Callable[[float], None]


class Device(Protocol):
    """One for each engine. Belongs to the engine's loop."""

    def hbm_bytes(self, layout: BlockLayout, chunk_tokens: int, fraction: float) -> int:
        """For KV, when nobody says how much; the weights are in place. Raises SettingsError."""
        ...

    def forward(self, hbm: HbmTier, store: Store | None) -> Forward:
        """What computes over `hbm`, nothing of which is in use; may take seconds."""
        ...

    def stopwatch(self) -> Callable[[Observe], None]:
        """Begin to measure what is computed from now on; the result ends that. Does not wait."""
        ...

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Around one part of a step: profilers show it under this name."""
        ...


class HostDevice:
    """The CPU: everything is computed by the calling thread, and over when it returns."""

    def __init__(self, decoder: Decoder, scales: Tensor | None = None) -> None:
        """`scales`, for KV of one byte, are what `HostAttention` takes."""
        self._decoder = decoder
        self._attention = HostAttention(decoder.config, decoder.device, scales)

    def hbm_bytes(self, layout: BlockLayout, chunk_tokens: int, fraction: float) -> int:
        return CPU_BYTES

    def forward(self, hbm: HbmTier, store: Store | None) -> Forward:
        return Forward(self._decoder, hbm, self._attention)

    def stopwatch(self) -> Callable[[Observe], None]:
        began_s = time.monotonic()
        return lambda observe: observe(time.monotonic() - began_s)

    def phase(self, name: str) -> AbstractContextManager[object]:
        return _NO_PHASE


_NO_PHASE = nullcontext()


def device_of(decoder: Decoder, max_batch: int, scales: Tensor | None = None) -> Device:
    """For a decoder whose weights are there already; `scales` are of KV of fp8 or int8."""
    if decoder.device.type != "cuda":
        return HostDevice(decoder, scales)
    from kvstore.engine.device_cuda import CudaDevice

    return CudaDevice(decoder, max_batch, scales)

"""The HBM tier: paged KV tensors on the engine's device, and the blocks in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore.errors import SettingsError
from kvstore.layout import BlockLayout
from kvstore.tiers.block_pool import BlockPool
from kvstore.tiers.hbm_copies import CopyStream, HostCopies
from kvstore.tiers.hbm_cuda import CudaCopies

TORCH_DTYPE = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}


class HbmTier:
    """As many blocks as fit into `capacity_bytes`, allocated once.

    `kv` is `[kv_heads, layers, 2, blocks * block_tokens, head_dim]`: block b is
    the tokens `[b * block_tokens, (b + 1) * block_tokens)`, and in C order its
    bytes are the canonical block. Belongs to one thread, the engine's loop. On
    a CPU the tensor is plain memory. `copies` moves blocks between it and RAM.
    """

    def __init__(
        self, layout: BlockLayout, capacity_bytes: int, device: torch.device | str = "cpu"
    ) -> None:
        blocks = capacity_bytes // layout.block_bytes
        if blocks < 1:
            raise SettingsError(
                f"hbm_bytes {capacity_bytes} is less than one block of {layout.block_bytes} bytes"
            )
        self.layout = layout
        self.pool = BlockPool(blocks)
        heads, layers, pair, tokens, head_dim = layout.shape
        # Zeros and not garbage: what is masked out of attention must still be a number.
        self.kv: Tensor = torch.zeros(
            (heads, layers, pair, blocks * tokens, head_dim),
            dtype=TORCH_DTYPE[layout.dtype],
            device=device,
        )
        self.copies = _copies_over(self.kv, layout)

    @property
    def capacity_tokens(self) -> int:
        return self.pool.blocks * self.layout.block_tokens

    def duplicate(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, `(source, target)`, in this order: copy on write."""
        for source, target in copies:
            self._block(target).copy_(self._block(source))

    def close(self) -> None:
        """Let go of the tensor. Copies must be over."""
        del self.kv, self.copies

    def _block(self, block: int) -> Tensor:
        tokens = self.layout.block_tokens
        return self.kv[:, :, :, block * tokens : (block + 1) * tokens]


def _copies_over(kv: Tensor, layout: BlockLayout) -> CopyStream:
    return CudaCopies.over(kv, layout) if kv.device.type == "cuda" else HostCopies(kv, layout)

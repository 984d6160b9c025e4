"""Where the elements of an engine's KV pages lie, on one device, whatever their order is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvstore.errors import LayoutError


@dataclass(frozen=True, slots=True)
class PagedTensors:
    """KV of all layers as views [blocks, kv_heads, block_tokens, head_dim]: k0, v0, k1, v1, ...

    Any strides will do that are the same for all layers, and those of blocks and heads for K
    and V. The memory is the engine's; the views keep it alive. Raises LayoutError.
    """

    views: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if len(self.views) < 2 or len(self.views) % 2:
            raise LayoutError(f"{len(self.views)} views; a layer has one of K and one of V")
        keys = self.views[0]
        for index, view in enumerate(self.views):
            like = self.views[index % 2]
            if view.dim() != 4 or view.shape != keys.shape or steps(view) != steps(like):
                raise LayoutError(
                    f"view {index} is {tuple(view.shape)} with strides {view.stride()}, "
                    f"not {tuple(like.shape)} with {like.stride()}"
                )
            if view.dtype != keys.dtype or view.device != keys.device:
                raise LayoutError(
                    f"view {index} is of {view.dtype} on {view.device}, "
                    f"not of {keys.dtype} on {keys.device}"
                )
        if steps(keys)[:2] != steps(self.views[1])[:2]:
            raise LayoutError(f"strides {keys.stride()} of K and {self.views[1].stride()} of V")

    @property
    def layers(self) -> int:
        return len(self.views) // 2

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[blocks, kv_heads, block_tokens, head_dim]"""
        blocks, heads, tokens, head_dim = self.views[0].shape
        return blocks, heads, tokens, head_dim


def steps(view: Tensor) -> tuple[int, int, int, int]:
    """Strides in elements; of a dimension with one index, 0, and 1 of the last."""
    block, head, token, element = (
        stride if size > 1 else 0 for stride, size in zip(view.stride(), view.shape, strict=True)
    )
    return block, head, token, element if view.shape[3] > 1 else 1


def paged(kv: Tensor, block_tokens: int) -> PagedTensors:
    """The HBM tier's tensor [kv_heads, layers, 2, slots, head_dim], in blocks."""
    if kv.dim() != 5 or kv.shape[2] != 2 or kv.shape[3] % block_tokens:
        raise LayoutError(
            f"{tuple(kv.shape)} is not [kv_heads, layers, 2, slots, head_dim] "
            f"with whole blocks of {block_tokens} slots"
        )
    heads, layers, _, slots, head_dim = kv.shape
    blocks = kv.view(heads, layers, 2, slots // block_tokens, block_tokens, head_dim)
    return PagedTensors(
        tuple(
            blocks[:, layer, half].transpose(0, 1) for layer in range(layers) for half in range(2)
        )
    )


def runs_of(blocks: Sequence[int], block_tokens: int) -> list[int]:
    """First slots of whole pages, as the copies take them."""
    return [block * block_tokens for block in blocks]

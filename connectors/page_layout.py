"""How an engine lays its KV tensors out: what a connector must know to read its pages.

An engine's memory is tensors of six dimensions, each in an order of its own. `PageLayout` names
the order; `Pages` (convert.py) then finds every element. What cannot be right is refused here,
when the description is made, and not found out from garbage later.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from kvstore.errors import LayoutError
from kvstore.layout import BlockLayout, Shard

DIMENSIONS = {
    "L": "layer",
    "K": "K or V",
    "B": "physical block",
    "H": "KV head",
    "N": "token in its block",
    "D": "element of a head",
}


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Tensors whose dimensions are `order`, the slowest first: letters of `DIMENSIONS`.

    B, H, N and D are always there. Without L every layer has a tensor of its own, in the order
    of layers; without K so have K and V, K first: `k0, v0, k1, v1, ...`. Thus "LBHNKD" is one
    tensor with K and V interleaved token by token, "KBNHD" a tensor a layer with V stacked
    behind K, "BNHD" two tensors a layer.

    `blocks` is the number of physical blocks, `block_tokens` the tokens of one. `kv_heads` are
    those of the whole model, and `heads` the ones in these tensors (None: all): a rank's share.
    `strides` are elements from one index to the next, a number for each letter of `order`
    (None: dense, or as the tensors themselves say). With `keys_transposed`, K lies `[D, N]`
    within its block and head, where V lies `[N, D]`.

    Raises LayoutError for what is unknown or contradicts itself.
    """

    order: str
    blocks: int
    block_tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    heads: Shard | None = None
    strides: tuple[int, ...] | None = None
    keys_transposed: bool = False

    def __post_init__(self) -> None:
        whole = self.block_layout(self.block_tokens)
        if self.blocks < 1:
            raise LayoutError(f"pages must have at least 1 block, not {self.blocks}")
        if len(set(self.order)) < len(self.order) or not set("BHND") <= set(self.order):
            raise LayoutError(f"order {self.order!r} must name B, H, N and D, and nothing twice")
        if not set(self.order) <= DIMENSIONS.keys():
            raise LayoutError(
                f"order {self.order!r} has a letter that is none of {', '.join(DIMENSIONS)}"
            )
        held = self.held
        whole.shard_range(held)
        if whole.kv_heads % held.heads or held.start % held.heads:
            raise LayoutError(f"{held} is no even share of {whole.kv_heads} KV heads")
        if self.strides is not None:
            self._check_strides(self.strides)
        if self.keys_transposed and not self.order.endswith("ND"):
            raise LayoutError("transposed keys are known only where the order ends with ND")
        if self.keys_transposed and self.strides and self.strides[-2:] != (self.head_dim, 1):
            raise LayoutError("transposed keys must lie densely within their block and head")

    @property
    def held(self) -> Shard:
        """The KV heads in these tensors."""
        return self.heads if self.heads is not None else Shard(0, self.kv_heads)

    @property
    def tensors(self) -> int:
        """How many tensors there are."""
        return (1 if "L" in self.order else self.layers) * (1 if "K" in self.order else 2)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of one tensor's dimensions, in `order`."""
        sizes = {
            "L": self.layers,
            "K": 2,
            "B": self.blocks,
            "H": self.held.heads,
            "N": self.block_tokens,
            "D": self.head_dim,
        }
        return tuple(sizes[letter] for letter in self.order)

    @property
    def elements(self) -> int:
        """Elements of one tensor."""
        return prod(self.shape)

    def block_layout(self, block_tokens: int) -> BlockLayout:
        """Of whole canonical blocks of `block_tokens` tokens of this model."""
        return BlockLayout(self.layers, self.kv_heads, self.head_dim, block_tokens, self.dtype)

    def check(self, layout: BlockLayout) -> None:
        """Raises LayoutError unless these pages hold what blocks of `layout` hold."""
        asked = self.block_layout(layout.block_tokens)
        if asked != layout:
            raise LayoutError(f"the pages hold {asked}, the namespace's blocks are {layout}")

    def _check_strides(self, strides: tuple[int, ...]) -> None:
        """No two indices may be the same element."""
        if len(strides) != len(self.order) or min(strides) < 1:
            raise LayoutError(f"strides {strides} are not one positive number for each of a tensor")
        reach = 0  # the last element that the faster dimensions touch
        for stride, size in sorted(zip(strides, self.shape, strict=True)):
            if size > 1 and stride <= reach:
                raise LayoutError(f"strides {strides} let two elements of {self.shape} overlap")
            reach += stride * (size - 1)

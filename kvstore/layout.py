"""The canonical order of a block's bytes, and which bytes a range of heads is.

Below HBM a block is `[kv head][layer][K, V][token][head dim]`, so that the
heads of one tensor-parallel rank are one contiguous run: a shard. A reader
that wants other heads than a writer stored gathers the runs that it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvstore.errors import LayoutError

LAYOUT_VERSION = 1

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3": 1, "int8": 1}


class Shard(NamedTuple):
    """KV heads `[start, start + heads)` of a block."""

    start: int
    heads: int

    @property
    def stop(self) -> int:
        return self.start + self.heads


class Copy(NamedTuple):
    """`nbytes` bytes from `source_offset` of stored shard number `source` to `target_offset`."""

    source: int
    source_offset: int
    target_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Shape of one block: `[kv_heads, layers, 2, block_tokens, head_dim]`, C order."""

    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise LayoutError(f"KV dtype {self.dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
        if min(self.layers, self.kv_heads, self.head_dim, self.block_tokens) < 1:
            raise LayoutError(f"every dimension of a block must be at least 1: {self}")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (self.kv_heads, self.layers, 2, self.block_tokens, self.head_dim)

    @property
    def head_bytes(self) -> int:
        """Bytes of one KV head of one block."""
        return self.layers * 2 * self.block_tokens * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.kv_heads * self.head_bytes

    @property
    def whole(self) -> Shard:
        return Shard(0, self.kv_heads)

    def shard_range(self, shard: Shard) -> tuple[int, int]:
        """Offset and length, in bytes, of `shard` within the whole block."""
        self._check(shard)
        return shard.start * self.head_bytes, shard.heads * self.head_bytes

    def shards(self, ranks: int) -> list[Shard]:
        """What each of `ranks` tensor-parallel ranks holds.

        With more ranks than KV heads, as engines do it, ranks share a head.
        """
        if ranks < 1 or max(ranks, self.kv_heads) % min(ranks, self.kv_heads):
            raise LayoutError(f"{self.kv_heads} KV heads cannot be split over {ranks} ranks evenly")
        if ranks >= self.kv_heads:
            share = ranks // self.kv_heads
            return [Shard(rank // share, 1) for rank in range(ranks)]
        heads = self.kv_heads // ranks
        return [Shard(rank * heads, heads) for rank in range(ranks)]

    def gather(self, wanted: Shard, stored: Sequence[Shard]) -> list[Copy]:
        """Copies that assemble `wanted` from `stored` shards, in order of target.

        Raises LayoutError when the stored shards leave a head of `wanted` out.
        """
        self._check(wanted)
        for shard in stored:
            self._check(shard)
        copies = []
        head = wanted.start
        while head < wanted.stop:
            # Of the shards that hold this head, the one that reaches furthest.
            source = max(
                (i for i, s in enumerate(stored) if s.start <= head < s.stop),
                key=lambda i: stored[i].stop,
                default=None,
            )
            if source is None:
                raise LayoutError(f"KV head {head} of {wanted} is in none of the stored shards")
            run = min(stored[source].stop, wanted.stop) - head
            copies.append(
                Copy(
                    source=source,
                    source_offset=(head - stored[source].start) * self.head_bytes,
                    target_offset=(head - wanted.start) * self.head_bytes,
                    nbytes=run * self.head_bytes,
                )
            )
            head += run
        return copies

    def _check(self, shard: Shard) -> None:
        if shard.heads < 1 or shard.start < 0 or shard.stop > self.kv_heads:
            raise LayoutError(f"{shard} does not lie within {self.kv_heads} KV heads")

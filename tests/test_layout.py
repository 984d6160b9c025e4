"""The canonical layout: shards are contiguous, and any reader can gather from any writer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvstore.errors import LayoutError
from kvstore.layout import DTYPE_BYTES, BlockLayout, Shard

LAYOUT = BlockLayout(layers=3, kv_heads=8, head_dim=4, block_tokens=2, dtype="float32")

# A block in which every element says where it belongs: [head, layer, K/V, token, dim].
BLOCK: NDArray[np.float32] = np.arange(np.prod(LAYOUT.shape), dtype=np.float32).reshape(
    LAYOUT.shape
)

layouts = st.builds(
    BlockLayout,
    layers=st.integers(1, 4),
    kv_heads=st.integers(1, 12),
    head_dim=st.integers(1, 8),
    block_tokens=st.integers(1, 4),
    dtype=st.sampled_from(list(DTYPE_BYTES)),
)


def assemble(layout: BlockLayout, wanted: Shard, stored: list[Shard], block: bytes) -> bytes:
    """`wanted`, built by the copies that `gather` plans, out of buffers of the stored shards."""
    sources = []
    for shard in stored:
        offset, nbytes = layout.shard_range(shard)
        sources.append(block[offset : offset + nbytes])
    target = bytearray(layout.shard_range(wanted)[1])
    written = 0
    for copy in layout.gather(wanted, stored):
        assert copy.target_offset == written, "in order, without holes or overlap"
        piece = sources[copy.source][copy.source_offset : copy.source_offset + copy.nbytes]
        assert len(piece) == copy.nbytes
        target[copy.target_offset : copy.target_offset + copy.nbytes] = piece
        written += copy.nbytes
    assert written == len(target)
    return bytes(target)


@pytest.mark.parametrize("writers", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("readers", [1, 2, 4, 8, 16])
def test_any_tensor_parallel_size_reads_any_other(writers: int, readers: int) -> None:
    stored = LAYOUT.shards(writers)
    for shard in LAYOUT.shards(readers):
        got = assemble(LAYOUT, shard, stored, BLOCK.tobytes())
        expected = BLOCK[shard.start : shard.stop]
        assert np.array_equal(np.frombuffer(got, np.float32).reshape(expected.shape), expected)


@given(st.data(), layouts)
def test_any_shards_that_cover_it_give_any_range_of_heads(
    data: st.DataObject, layout: BlockLayout
) -> None:
    shards = st.integers(0, layout.kv_heads - 1).flatmap(
        lambda start: st.builds(Shard, st.just(start), st.integers(1, layout.kv_heads - start))
    )
    wanted, stored = data.draw(shards), data.draw(st.lists(shards, max_size=6))
    block = np.random.default_rng(0).bytes(layout.block_bytes)
    held = {head for shard in stored for head in range(shard.start, shard.stop)}
    if set(range(wanted.start, wanted.stop)) <= held:
        offset, nbytes = layout.shard_range(wanted)
        assert assemble(layout, wanted, stored, block) == block[offset : offset + nbytes]
    else:
        with pytest.raises(LayoutError, match="none of the stored shards"):
            layout.gather(wanted, stored)


def test_what_was_stored_whole_is_read_in_one_copy() -> None:
    for wanted in (LAYOUT.whole, Shard(0, 1), Shard(3, 4)):
        assert len(LAYOUT.gather(wanted, [LAYOUT.whole])) == 1


def test_gather_takes_the_fewest_copies() -> None:
    stored = [Shard(0, 1), Shard(0, 2), Shard(0, 5), Shard(4, 2), Shard(5, 3)]
    assert [copy.source for copy in LAYOUT.gather(LAYOUT.whole, stored)] == [2, 4]


@given(layouts)
def test_sizes_are_those_of_the_array(layout: BlockLayout) -> None:
    elements = int(np.prod(layout.shape))
    assert layout.block_bytes == elements * DTYPE_BYTES[layout.dtype]
    assert layout.shard_range(layout.whole) == (0, layout.block_bytes)
    assert layout.head_bytes * layout.kv_heads == layout.block_bytes


@given(layouts, st.integers(1, 48))
def test_ranks_hold_every_head_in_order(layout: BlockLayout, ranks: int) -> None:
    heads = layout.kv_heads
    if heads % ranks and ranks % heads:
        with pytest.raises(LayoutError, match="evenly"):
            layout.shards(ranks)
        return
    shards = layout.shards(ranks)
    assert len(shards) == ranks
    assert len({shard.heads for shard in shards}) == 1
    assert shards == sorted(shards)
    covered = [head for shard in shards for head in range(shard.start, shard.stop)]
    assert set(covered) == set(range(heads))
    assert len(covered) == max(ranks, heads)


@pytest.mark.parametrize(
    "shard", [Shard(0, 0), Shard(-1, 2), Shard(7, 2), Shard(8, 1), Shard(0, 9)]
)
def test_a_shard_outside_the_block_is_refused(shard: Shard) -> None:
    with pytest.raises(LayoutError):
        LAYOUT.shard_range(shard)
    with pytest.raises(LayoutError):
        LAYOUT.gather(shard, [LAYOUT.whole])
    with pytest.raises(LayoutError):
        LAYOUT.gather(LAYOUT.whole, [LAYOUT.whole, shard])


@pytest.mark.parametrize("ranks", [0, -1, 3, 12])
def test_ranks_that_do_not_divide_the_heads_are_refused(ranks: int) -> None:
    with pytest.raises(LayoutError):
        LAYOUT.shards(ranks)


def test_a_dtype_that_is_not_known_is_refused() -> None:
    with pytest.raises(LayoutError, match="float64"):
        BlockLayout(1, 1, 1, 1, "float64")

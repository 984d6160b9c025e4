"""Pages of every layout become canonical blocks and back, bit for bit, and nothing else changes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.connectors.convert import Pages
from kvstore.connectors.device_pages import DevicePages, pages_of
from kvstore.connectors.page_layout import PageLayout
from kvstore.errors import LayoutError
from kvstore.layout import DTYPE_BYTES, Shard
from tests.connectors.pages import TORCH_DTYPE, random_tensors, slow_block

# Of vLLM since 0.26 (all six), vLLM before, SGLang's host pools, transformers, our own engine.
KNOWN_ORDERS = (
    *("LBHNKD", "LBNHKD", "LHBNKD", "BLHNKD", "BLNHKD", "BHLNKD"),
    *("KBNHD", "KLBNHD", "KBNLHD", "KBLNHD", "HBND", "BHND", "BHKND", "HLKBND"),
)
BLOCK_SIZES = ((1, 1), (4, 4), (2, 4), (4, 2), (1, 8), (8, 1), (3, 2), (4, 6), (5, 3))

KINDS = st.sampled_from([Pages, DevicePages])  # the second works on any device, this one too


def orders() -> st.SearchStrategy[str]:
    """Any permutation of what must be there and of what may."""
    letters = st.sampled_from(["BHND", "LBHND", "KBHND", "LKBHND"])
    return letters.flatmap(lambda named: st.permutations(named).map("".join))


@st.composite
def cases(draw: st.DrawFn) -> tuple[PageLayout, int, list[int], int, int]:
    """A layout, the store's block size, a block table, the first token and the blocks."""
    kv_heads, heads, start = draw(st.sampled_from([(1, 1, 0), (2, 2, 0), (4, 2, 2), (4, 1, 3)]))
    page_tokens, block_tokens = draw(st.sampled_from(BLOCK_SIZES))
    order = draw(st.one_of(st.sampled_from(KNOWN_ORDERS), orders()))
    layout = PageLayout(
        order=order,
        blocks=draw(st.integers(8, 10)),
        block_tokens=page_tokens,
        layers=draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 3)),
        dtype=draw(st.sampled_from(sorted(DTYPE_BYTES))),
        heads=Shard(start, heads),
        keys_transposed=order.endswith("ND") and draw(st.booleans()),
    )
    if draw(st.booleans()):
        layout = padded(layout, draw(st.integers(1, 3)))
    table = draw(st.permutations(range(layout.blocks)))
    room = layout.blocks * page_tokens
    first = draw(st.integers(0, max(0, room - block_tokens)))
    blocks = draw(st.integers(1, max(1, min(3, (room - first) // block_tokens))))
    return layout, block_tokens, list(table), first, blocks


def padded(layout: PageLayout, padding: int) -> PageLayout:
    """With a gap between the slowest dimension's indices, as allocators that align leave it."""
    strides, step = [], 1
    for size in reversed(layout.shape):
        strides.append(step)
        step *= size
    strides[-1] += padding
    return dataclasses.replace(layout, strides=tuple(reversed(strides)))


def buffers(layout: PageLayout, heads: int, block_tokens: int, blocks: int) -> list[memoryview]:
    nbytes = layout.block_layout(block_tokens).head_bytes * heads
    return [memoryview(bytearray(nbytes)) for _ in range(blocks)]


def all_bytes(tensors: list[torch.Tensor]) -> bytes:
    return b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors)


@settings(max_examples=250)
@given(cases(), KINDS)
def test_copy_out_gives_the_canonical_bytes(
    case: tuple[PageLayout, int, list[int], int, int], kind: type[Pages]
) -> None:
    layout, block_tokens, table, first, blocks = case
    tensors = random_tensors(layout)
    if first + blocks * block_tokens > len(table) * layout.block_tokens:
        blocks = 0
    views = buffers(layout, layout.held.heads, block_tokens, blocks)
    kind(layout, tensors).copy_out(table, first, views, block_tokens)
    for i, view in enumerate(views):
        start = first + i * block_tokens
        tokens = range(start, start + block_tokens)
        assert bytes(view) == slow_block(layout, tensors, table, tokens, layout.held)


@settings(max_examples=250)
@given(cases(), KINDS, st.data())
def test_copy_in_writes_the_wanted_tokens_and_heads_alone(
    case: tuple[PageLayout, int, list[int], int, int], kind: type[Pages], data: st.DataObject
) -> None:
    layout, block_tokens, table, first, blocks = case
    room = len(table) * layout.block_tokens
    stop = min(first + blocks * block_tokens, room)
    begin = data.draw(st.integers(first, stop), "begin")
    wanted = range(begin, data.draw(st.integers(begin, stop), "end"))
    shards = [Shard(s, n) for n in (1, 2, 4) for s in range(0, layout.kv_heads, n)]
    shard = data.draw(st.sampled_from([s for s in shards if s.stop <= layout.kv_heads]), "shard")

    # What a writer with the whole model in another layout would have stored for these tokens.
    other = PageLayout("LKBHND", 64, block_tokens, layout.layers, layout.kv_heads,
                       layout.head_dim, layout.dtype)  # fmt: skip
    source = random_tensors(other, seed=1)
    theirs = list(range(64))
    stored = [
        slow_block(other, source, theirs, range(i * block_tokens, (i + 1) * block_tokens), shard)
        for i in range(blocks)
    ]

    tensors = random_tensors(layout)
    before = [tensor.clone() for tensor in tensors]
    views = [memoryview(block) for block in stored]
    kind(layout, tensors).copy_in(table, first, views, block_tokens, shard, wanted)

    for head in range(layout.held.start, layout.held.stop):
        for token in range(min(room, stop)):
            one = Shard(head, 1)
            got = slow_block(layout, tensors, table, range(token, token + 1), one)
            if token in wanted and shard.start <= head < shard.stop:
                at = range(token - first, token - first + 1)
                assert got == slow_block(other, source, theirs, at, one)
            else:
                assert got == slow_block(layout, before, table, range(token, token + 1), one)
    if not len(wanted):
        assert all_bytes(tensors) == all_bytes(before)


class BusyPages(DevicePages):
    """While pages are on their way through this process, the engine writes tokens 4 and 27."""

    tensor: torch.Tensor

    def _fetched(self, used: dict[int, int]) -> Any:
        fetched = super()._fetched(used)
        self.tensor[0, 4] = self.tensor[1, 11] = 7
        return fetched


@pytest.mark.parametrize("transposed", [True, False])
def test_what_the_engine_writes_meanwhile_stays(transposed: bool) -> None:
    layout = PageLayout("BHND", 3, 16, 1, 1, 2, "float32", keys_transposed=transposed)
    keys, values = (torch.zeros(3, 16, 2) for _ in range(2))
    pages = BusyPages(layout, [keys, values])
    pages.tensor = values
    views = [memoryview(np.ones(64, np.float32).tobytes()) for _ in range(2)]
    pages.copy_in([0, 1], 0, views, 16, layout.held, range(5, 27))
    expected = torch.zeros(32, 2)
    expected[5:27] = 1
    expected[[4, 27]] = 7
    assert torch.equal(values[:2].flatten(0, 1), expected)


@pytest.mark.parametrize("order", KNOWN_ORDERS)
@pytest.mark.parametrize(("page_tokens", "block_tokens"), [(32, 64), (64, 32), (16, 256)])
def test_real_sizes_there_and_back(order: str, page_tokens: int, block_tokens: int) -> None:
    layout = PageLayout(order, 768 // page_tokens, page_tokens, 2, 3, 8, "bfloat16")
    tensors, target = random_tensors(layout), random_tensors(layout, seed=1)
    table = torch.randperm(layout.blocks).tolist()
    views = buffers(layout, 3, block_tokens, 768 // block_tokens)
    pages = Pages(layout, tensors)
    pages.copy_out(table, 0, views, block_tokens)
    Pages(layout, target).copy_in(table, 0, views, block_tokens, layout.held, range(768))
    assert all_bytes(target) == all_bytes(tensors)


def test_layers_in_one_allocation_are_one_part() -> None:
    layout = PageLayout("BHKND", 4, 8, 5, 2, 4, "bfloat16", keys_transposed=True)
    storage = torch.zeros(5 * layout.elements, dtype=torch.bfloat16)
    together = Pages(layout, list(storage.view(5, 4, 2, 8, 8)))
    assert len(together.parts) == 2  # K, transposed, and V
    apart = Pages(layout, [layer.clone() for layer in storage.view(5, -1)])
    assert len(apart.parts) == 10


def test_pages_are_views() -> None:
    """Nothing was copied when they were described: what the engine writes later is read."""
    layout = PageLayout("LBHNKD", 2, 2, 2, 1, 2, "float32")
    (tensor,) = random_tensors(layout)
    pages = Pages(layout, [tensor])
    tensor.copy_(torch.arange(tensor.numel()))
    view = buffers(layout, 1, 2, 1)[0]
    pages.copy_out([1], 0, [view], 2)
    assert bytes(view) == slow_block(layout, [tensor], [1], range(2), layout.held)


@pytest.mark.parametrize("table", [[0, -1], [0, 4], [0]])
def test_pages_that_do_not_exist_are_refused(table: list[int]) -> None:
    layout = PageLayout("BHND", 4, 2, 1, 1, 2, "float32")
    pages = Pages(layout, random_tensors(layout))
    views = buffers(layout, 1, 4, 1)
    with pytest.raises(LayoutError):
        pages.copy_out(table, 0, views, 4)
    with pytest.raises(LayoutError):
        pages.copy_in(table, 0, views, 4, layout.held, range(4))


def test_a_buffer_of_another_length_is_refused() -> None:
    layout = PageLayout("BHND", 4, 2, 1, 1, 2, "float32")
    pages = Pages(layout, random_tensors(layout))
    with pytest.raises(LayoutError, match="no block"):
        pages.copy_out([0, 1], 0, buffers(layout, 2, 4, 1), 4)


GOOD = PageLayout("BHND", 4, 2, 3, 4, 2, "float32")


@pytest.mark.parametrize(
    "changes",
    [
        {"order": "BHN"},
        {"order": "BHNDD"},
        {"order": "BHNDX"},
        {"blocks": 0},
        {"block_tokens": 0},
        {"layers": -1},
        {"dtype": "float64"},
        {"heads": Shard(0, 5)},
        {"heads": Shard(1, 2)},
        {"heads": Shard(0, 3)},
        {"strides": (16, 4, 2)},
        {"strides": (16, 3, 2, 1)},
        {"strides": (16, 4, 2, 0)},
        {"order": "BNHD", "keys_transposed": True},
        {"strides": (32, 8, 4, 1), "keys_transposed": True},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_when_described(changes: dict[str, object]) -> None:
    with pytest.raises(LayoutError):
        dataclasses.replace(GOOD, **changes)  # type: ignore[arg-type]


TENSOR_CHANGES: dict[str, Callable[[list[torch.Tensor]], list[torch.Tensor]]] = {
    "too few": lambda tensors: tensors[:-1],
    "too large": lambda tensors: [torch.cat([tensor, tensor]) for tensor in tensors],
    "of another dtype": lambda tensors: [tensor.double() for tensor in tensors],
    "of a dtype of the same size": lambda tensors: [tensor.view(torch.int32) for tensor in tensors],
    "elsewhere": lambda tensors: [tensor.to("meta") for tensor in tensors],
    "with gaps": lambda tensors: [tensor.reshape(8, -1).repeat(1, 2)[:, ::2] for tensor in tensors],
}


@pytest.mark.parametrize("name", TENSOR_CHANGES)
def test_tensors_that_do_not_fit_are_refused(name: str) -> None:
    tensors = TENSOR_CHANGES[name](random_tensors(GOOD))
    if name == "with gaps":
        tensors = [tensor.t() for tensor in tensors]
    with pytest.raises(LayoutError):
        Pages(GOOD, tensors)


def test_strides_beyond_the_tensor_are_refused() -> None:
    layout = padded(GOOD, 3)
    with pytest.raises(LayoutError, match="beyond"):
        Pages(layout, [tensor[:-1].clone() for tensor in random_tensors(layout)])


def test_halves_of_another_dtype_are_told_apart() -> None:
    """bfloat16 and float16 have one size and other meanings."""
    pairs = itertools.permutations(["bfloat16", "float16"], 2)
    for named, given_ in pairs:
        layout = dataclasses.replace(GOOD, dtype=named)
        tensors = [tensor.to(TORCH_DTYPE[given_]) for tensor in random_tensors(GOOD)]
        with pytest.raises(LayoutError, match="a tensor of torch"):
            Pages(layout, tensors)


@pytest.mark.gpu
def test_pages_of_a_gpu_there_and_back() -> None:
    for order in KNOWN_ORDERS:
        layout = PageLayout(order, 24, 32, 2, 3, 8, "bfloat16")
        tensors = [tensor.cuda() for tensor in random_tensors(layout)]
        target = [tensor.cuda() for tensor in random_tensors(layout, seed=1)]
        table = torch.randperm(layout.blocks).tolist()
        views = buffers(layout, 3, 16, 48)
        pages_of(layout, tensors).copy_out(table, 0, views, 16)
        pages_of(layout, target).copy_in(table, 0, views, 16, layout.held, range(768))
        assert all_bytes([t.cpu() for t in target]) == all_bytes([t.cpu() for t in tensors])


def test_the_pages_of_a_device_are_chosen_by_it() -> None:
    tensors = random_tensors(GOOD)
    assert type(pages_of(GOOD, tensors)) is Pages
    with pytest.raises(LayoutError, match="one device"):
        pages_of(GOOD, [tensor.to("meta") for tensor in tensors])
    with pytest.raises(LayoutError, match="one device"):
        pages_of(GOOD, [tensors[0].to("meta"), *tensors[1:]])
    with pytest.raises(LayoutError, match="6"):
        pages_of(GOOD, [tensor.to("meta") for tensor in tensors[1:]])

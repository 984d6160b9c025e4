"""Pages, buffers and random layouts for the tests of the block copies, on any runtime."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from kvstore.connectors.page_layout import PageLayout
from kvstore.kernels.cuda_module import Runtime
from kvstore.layout import DTYPE_BYTES, Shard
from tests.connectors.pages import random_tensors

# vLLM's, before and after 0.26, SGLang's, transformers', and our own engine's.
ORDERS = (
    *("LBHNKD", "LBNHKD", "LHBNKD", "BLHNKD", "BLNHKD", "BHLNKD"),
    *("KBNHD", "KLBNHD", "KBNLHD", "KBLNHD", "HBND", "BHND", "BHKND", "HLKBND"),
)
# (page, block) tokens
SIZES = ((16, 16), (16, 16), (4, 8), (8, 4), (1, 4), (5, 3), (32, 16), (3, 3), (1, 1))
GUARD = 64


class Memory:
    """Buffers that the runtime's device can reach, with guards around each that must stay."""

    def __init__(self, runtime: Runtime, on_device: bool = False) -> None:
        self.device = runtime.device_type
        self.on_device = on_device
        self._whole: list[Tensor] = []

    def buffer(self, content: bytes) -> memoryview | Tensor:
        whole = torch.full((len(content) + 2 * GUARD,), 0xA5, dtype=torch.uint8)
        inside = slice(GUARD, GUARD + len(content))
        whole[inside] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if self.device == "cuda":
            whole = whole.to("cuda") if self.on_device else whole.pin_memory()
        self._whole.append(whole)
        return whole[inside] if self.on_device else memoryview(whole[inside].numpy().data)

    def contents(self) -> list[bytes]:
        """What the buffers hold, once the device is done. Guards must be what they were."""
        self.settle()
        out = []
        for whole in self._whole:
            raw = whole.cpu().numpy().tobytes()
            assert raw[:GUARD] == raw[-GUARD:] == b"\xa5" * GUARD, "written outside a buffer"
            out.append(raw[GUARD:-GUARD])
        return out

    def settle(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def on_device(tensors: Sequence[Tensor], runtime: Runtime) -> list[Tensor]:
    """Copies for the runtime to work on; the tensors stay for the reference to work on."""
    return [tensor.clone().to(runtime.device_type) for tensor in tensors]


@dataclasses.dataclass
class Case:
    """Blocks of a sequence in the pages of a random layout, and a part of them to copy."""

    layout: PageLayout
    block_tokens: int
    runs: list[list[int]]  # of each block
    layers: range
    heads: range
    seed: int

    def tensors(self, number: int = 0) -> list[Tensor]:
        return random_tensors(self.layout, 2 * self.seed + number)

    @property
    def flat(self) -> list[int]:
        return [run for runs in self.runs for run in runs]

    def sequence(self) -> list[int]:
        """A block table, one page a token, for readers that go by tokens."""
        each = self.block_tokens // len(self.runs[0])
        return [run + i for run in self.flat for i in range(each)]


def random_case(seed: int) -> Case:
    """Any layout, dtype and place of the tokens; heads in the pages are a shard of the model's."""
    chance = random.Random(seed)
    page_tokens, block_tokens = chance.choice(SIZES)
    order = ORDERS[seed % len(ORDERS)] if seed % 3 else "".join(chance.sample("LKBHND", 6))
    kv_heads, heads, start = chance.choice([(1, 1, 0), (2, 2, 0), (4, 2, 2), (4, 1, 3), (3, 3, 0)])
    layout = PageLayout(
        order=order,
        blocks=chance.randint(8, 12),
        block_tokens=page_tokens,
        layers=chance.randint(1, 4),
        kv_heads=kv_heads,
        head_dim=chance.choice([1, 3, 4, 8, 12, 16, 64, 80, 128]),
        dtype=chance.choice(sorted(DTYPE_BYTES)),
        heads=Shard(start, heads),
        keys_transposed=order.endswith("ND") and chance.random() < 0.3,
    )
    if chance.random() < 0.3:
        fastest = 1 if layout.keys_transposed else 0
        layout = padded(layout, chance.choice([1, 8, 16]), chance.randrange(fastest, len(order)))
    first = 0 if seed % 2 else chance.randint(0, page_tokens)
    table = chance.sample(range(layout.blocks), layout.blocks)
    room = (layout.blocks * page_tokens - first) // block_tokens
    blocks = chance.randint(1, max(1, min(4, room)))
    low, first_head = chance.randrange(layout.layers), chance.randrange(heads)
    return Case(
        layout,
        block_tokens,
        sequence_runs(table, page_tokens, first, blocks, block_tokens),
        range(low, chance.randint(low + 1, layout.layers)),
        range(first_head, chance.randint(first_head + 1, heads)),
        seed,
    )


def sequence_runs(
    table: Sequence[int], page_tokens: int, first: int, blocks: int, block_tokens: int
) -> list[list[int]]:
    """Runs of the blocks that begin at token `first` of a sequence with that block table."""
    each = gcd(first, page_tokens, block_tokens)
    starts = range(first, first + blocks * block_tokens, each)
    slots = [table[at // page_tokens] * page_tokens + at % page_tokens for at in starts]
    count = block_tokens // each
    return [slots[i : i + count] for i in range(0, len(slots), count)]


def padded(layout: PageLayout, padding: int, behind: int) -> PageLayout:
    """With a gap behind one of the dimensions, counted from the fastest, as alignment leaves it."""
    strides, step = [], 1
    for number, size in enumerate(reversed(layout.shape)):
        strides.append(step)
        step = step * size + (padding if number == behind else 0)
    return dataclasses.replace(layout, strides=tuple(reversed(strides)))

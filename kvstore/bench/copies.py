"""Pages to and from pinned RAM, by kernel and by DMA, beside one large copy of as many bytes.

Pages lie in random order, and each block has a place of its own in RAM. The large copy is of the
very same memory. Both directions, alone and at once. Judged is the way that the HBM tier takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from kvstore.bench.benchmark import Bench
from kvstore.bench.card import Work
from kvstore.bench.pages import random_kv, shuffled
from kvstore.bench.rows import Row, Unmeasured
from kvstore.bench.sizes import token_bytes
from kvstore.bench.turns import rates
from kvstore.kernels.block_copies import BlockCopies, addresses
from kvstore.kernels.block_copy_cuda import KernelCopies
from kvstore.kernels.block_copy_dma import DmaCopies
from kvstore.kernels.paged_tensors import paged, runs_of
from kvstore.layout import BlockLayout
from kvstore.quantities import format_size

ONE_WAY_AT_LEAST, BOTH_AT_LEAST = 0.90, 0.85
WAYS: dict[str, type[KernelCopies | DmaCopies]] = {"kernel": KernelCopies, "DMA": DmaCopies}


class Pages:
    """Pages of one block size on the device, as many bytes in RAM, and the ways between them."""

    def __init__(self, bench: Bench, block_tokens: int) -> None:
        model, card = bench.sizes.model, bench.card
        self.block_tokens = block_tokens
        self.block_bytes = block_tokens * token_bytes(model, bench.dtype.itemsize)
        count = max(1, bench.sizes.copy_bytes // self.block_bytes)
        self.total_bytes = count * self.block_bytes
        self.kv = random_kv(model, count * block_tokens, model.layers, bench.dtype, card.device)
        self.flat = self.kv.view(-1).view(torch.uint8)
        self.ram = card.pinned(self.total_bytes)
        self.ram.zero_()  # its pages are there before the first copy
        self._runs = runs_of(shuffled(count), block_tokens)
        self.paged = pages = paged(self.kv, block_tokens)
        # Looked up once, as the HBM tier does it.
        blocks = list(self.ram.view(count, -1))
        self._places = addresses(blocks, self.block_bytes, pages, out=True)
        self._ways: dict[str, BlockCopies] = {
            name: way(pages, block_tokens, runtime=card.runtime) for name, way in WAYS.items()
        }

    def out(self, way: str) -> None:
        self._ways[way].copy_out(self._runs, self._places)

    def into(self, way: str) -> None:
        self._ways[way].copy_in(self._runs, self._places)

    def large_out(self) -> None:
        self.ram.copy_(self.flat, non_blocking=True)

    def large_in(self) -> None:
        self.flat.copy_(self.ram, non_blocking=True)


def tier_way(bench: Bench, pages: Pages) -> str:
    """One of WAYS: the one that the HBM tier has chosen, by its own measure, not by ours."""
    model = bench.sizes.model
    layout = BlockLayout(
        layers=model.layers,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        block_tokens=pages.block_tokens,
        dtype=bench.sizes.dtype,
    )
    copies = bench.card.tier_copies(pages.paged, layout)
    return next(name for name, way in WAYS.items() if isinstance(copies, way))


def measure(bench: Bench, block_tokens: int) -> Iterator[Row | Unmeasured]:
    """One block size; bounds are those of the way that the HBM tier takes."""
    copy_bytes = bench.sizes.copy_bytes
    bench.need(hbm_bytes=2 * copy_bytes, ram_bytes=2 * copy_bytes)
    card, pages = bench.card, Pages(bench, block_tokens)
    _check(bench, pages)
    works: dict[str, Work] = {"large out": pages.large_out, "large in": pages.large_in}
    for way in WAYS:
        works[f"{way} out"], works[f"{way} in"] = partial(pages.out, way), partial(pages.into, way)
    turns = {name: partial(card.seconds, work) for name, work in works.items()}
    rate = rates(turns, bench.sizes.rounds, pages.total_bytes)
    chosen = tier_way(bench, pages)
    label = f"{block_tokens}-token blocks"
    for way in WAYS:
        for direction, to in (("out", "to"), ("in", "from")):
            yield Row(
                name=f"pages {to} RAM by {way}, {label}",
                group="copies",
                value=rate[f"{way} {direction}"],
                unit="GB/s",
                ceiling=rate[f"large {direction}"],
                against=f"one pinned copy of {format_size(pages.total_bytes)}",
                at_least=ONE_WAY_AT_LEAST if way == chosen else None,
                note=f"{format_size(pages.block_bytes)} a block",
            )
    yield from _both_ways(bench, pages, Pages(bench, block_tokens), chosen, label)


def _check(bench: Bench, pages: Pages) -> None:
    """Raises RuntimeError unless each way writes what the other reads."""
    card, before = bench.card, pages.flat.clone()
    for there, back in (("kernel", "DMA"), ("DMA", "kernel")):
        card.seconds(partial(pages.out, there))
        pages.flat.zero_()
        card.seconds(partial(pages.into, back))
        if not torch.equal(pages.flat, before):
            raise RuntimeError(f"what {there} copied out is not what {back} copied in")


def _both_ways(
    bench: Bench, pages: Pages, other: Pages, way: str, label: str
) -> Iterator[Row | Unmeasured]:
    card = bench.card
    turns = {
        "large": partial(card.seconds_at_once, [pages.large_out, other.large_in]),
        "blocks": partial(
            card.seconds_at_once, [partial(pages.out, way), partial(other.into, way)]
        ),
    }
    rate = rates(turns, bench.sizes.rounds, 2 * pages.total_bytes)
    yield Row(
        name=f"pages both ways at once by {way}, {label}",
        group="copies",
        value=rate["blocks"],
        unit="GB/s",
        ceiling=rate["large"],
        against="two pinned copies, one each way, at once; both directions counted",
        at_least=BOTH_AT_LEAST,
    )

"""Attention of decoding sequences, and the write of their K and V, beside the memory's speed.

Decode attention reads the K and V of each layer once, and nothing else to speak of: what it
reads in a second is set against a copy on the device, of which bytes read and bytes written
both count. Before anything is timed, results are compared with another implementation's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kvstore.bench.benchmark import Bench
from kvstore.bench.pages import block_tables, random_kv, shuffled
from kvstore.bench.peers import Attend, Peer, contiguous, peers
from kvstore.bench.rows import Row, Unmeasured
from kvstore.bench.sizes import DecodeShape, pair_bytes, token_bytes
from kvstore.bench.turns import Turn, medians
from kvstore.kernels.paged_attention_cuda import DecodeWorkspace, decode
from kvstore.kernels.write_kv_cuda import Rotation, write_kv

COPY_AT_LEAST, PEER_AT_LEAST = 0.85, 1.0
FP8 = torch.float8_e4m3fn
# Of the largest element; both compute in bf16 here and there, in an order of their own.
_TOLERANCE = 0.02
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", FP8: "fp8"}


class Decoding:
    """Decode attention of one shape over all layers of a KV tensor."""

    def __init__(self, bench: Bench, shape: DecodeShape, kv: Tensor) -> None:
        model, device = bench.sizes.model, bench.card.device
        self.shape, self.kv = shape, kv
        self.layers = kv.shape[1]
        self.block_tokens = bench.sizes.block_tokens
        self.tables = block_tables(shape, self.block_tokens, device)
        self.lens = torch.full((shape.batch,), shape.context_tokens, dtype=torch.int32).to(device)
        heads = (shape.batch, model.heads, model.head_dim)
        self.query = torch.randn(heads, dtype=bench.dtype, device=device)
        self.out = torch.empty_like(self.query)
        self.scales: Tensor | None = None
        if kv.element_size() == 1:
            self.scales = torch.ones(model.kv_heads, self.layers, 2, device=device)
        self._workspace = DecodeWorkspace(shape.batch, model.heads, model.head_dim, device)
        self._runtime = bench.card.runtime

    @property
    def layer_bytes(self) -> int:
        """K and V that one layer reads."""
        heads, _, pair, _, head_dim = self.kv.shape
        tokens = self.shape.batch * self.shape.context_tokens
        return heads * pair * head_dim * self.kv.element_size() * tokens

    def layer(self, layer: int) -> None:
        decode(
            self.query,
            self.kv,
            layer,
            self.tables,
            self.lens,
            self.block_tokens,
            self.out,
            self._workspace,
            self.scales,
            self._runtime,
        )

    def all_layers(self) -> None:
        for layer in range(self.layers):
            self.layer(layer)


def measure(bench: Bench, dtype: torch.dtype) -> Iterator[Row | Unmeasured]:
    """All shapes over one KV tensor of `dtype`."""
    sizes, device = bench.sizes, bench.card.device
    slots = max(shape.batch * shape.context_tokens for shape in sizes.decode_shapes)
    layer_bytes = slots * pair_bytes(sizes.model, dtype.itemsize)
    # A layer for ourselves and one for whoever is measured beside us, twice while it is made.
    needed = (sizes.model.layers + 3) * layer_bytes + 2 * sizes.device_copy_bytes
    bench.need(hbm_bytes=needed)
    kv = random_kv(sizes.model, slots, sizes.model.layers, dtype, device)
    target = torch.empty(sizes.device_copy_bytes, dtype=torch.uint8, device=device)
    source = torch.ones_like(target)
    for shape in sizes.decode_shapes:
        yield from _of_shape(bench, Decoding(bench, shape, kv), partial(target.copy_, source))


def _of_shape(
    bench: Bench, decoding: Decoding, copy: partial[Tensor]
) -> Iterator[Row | Unmeasured]:
    card, sizes = bench.card, bench.sizes
    name = f"decode attention, {_NAMES[decoding.kv.dtype]}, {decoding.shape.label}"
    turns: dict[str, Turn] = {
        "ours": lambda: card.seconds(decoding.all_layers) / decoding.layers,
        "copy": lambda: card.seconds(copy),
    }
    beside: list[Peer] = []
    for made in peers(decoding, sizes.model, card.seconds):
        if isinstance(made, Unmeasured):
            yield Unmeasured(f"{name}, beside {made.name}", made.outcome, made.reason)
            continue
        _compare(decoding, made.attend, made.name)
        beside.append(made)
        turns[made.name] = partial(_peer_seconds, bench, made)
    if not beside:
        _compare(decoding, contiguous(decoding, torch.float32).attend, "torch")
    seconds = medians(turns, sizes.rounds)
    rate = {who: decoding.layer_bytes / taken / 1e9 for who, taken in seconds.items()}
    yield Row(
        name=name,
        group="attention",
        value=rate["ours"],
        unit="GB/s",
        ceiling=2 * sizes.device_copy_bytes / seconds["copy"] / 1e9,
        against="a copy on the device, bytes read and written",
        at_least=COPY_AT_LEAST,
        note=f"{seconds['ours'] * 1e6:.0f} us a layer; K and V read once are what counts",
    )
    for peer in beside:
        yield Row(
            name=f"{name}, beside {peer.name}",
            group="attention",
            value=rate["ours"],
            unit="GB/s",
            ceiling=rate[peer.name],
            against=peer.about,
            at_least=PEER_AT_LEAST,
        )


def _peer_seconds(bench: Bench, peer: Peer) -> float:
    """Of one call; several, since one may be over before a clock ticks."""
    repeats = bench.sizes.model.layers

    def calls() -> None:
        for _ in range(repeats):
            peer.attend()

    return bench.card.seconds(calls) / repeats


def _compare(decoding: Decoding, attend: Attend, name: str) -> None:
    """Raises RuntimeError unless both give the same for the first layer."""
    decoding.out.fill_(torch.nan)
    decoding.layer(0)
    theirs = attend().reshape(decoding.out.shape).float()
    difference = (decoding.out.float() - theirs).abs().max()
    if not bool(difference <= _TOLERANCE * theirs.abs().max()):
        raise RuntimeError(f"our attention differs from {name}'s by {float(difference):.3g}")


def measure_writes(bench: Bench) -> Iterator[Row | Unmeasured]:
    """K and V of new tokens into pages of every layer, rotated on the way."""
    sizes, card, model = bench.sizes, bench.card, bench.sizes.model
    tokens = max(sizes.written_tokens)
    blocks = -(-tokens // sizes.block_tokens) * 4
    slots_bytes = blocks * sizes.block_tokens * token_bytes(model, bench.dtype.itemsize)
    bench.need(hbm_bytes=slots_bytes)
    kv = random_kv(model, blocks * sizes.block_tokens, model.layers, bench.dtype, card.device)
    angles = torch.randn(tokens, model.head_dim // 2, device=card.device)
    for count in sizes.written_tokens:
        own = shuffled(blocks * sizes.block_tokens)[:count]
        slots = torch.tensor(own, dtype=torch.int64).to(card.device)
        pairs = torch.randn(
            count, 2, model.kv_heads, model.head_dim, dtype=bench.dtype, device=card.device
        )
        positions = torch.arange(count, device=card.device)
        rotation = Rotation(positions, angles.cos(), angles.sin())

        def all_layers(
            pairs: Tensor = pairs, slots: Tensor = slots, rotation: Rotation = rotation
        ) -> None:
            key, value = pairs.unbind(1)
            for layer in range(model.layers):
                write_kv(key, value, kv, layer, slots, rotation, runtime=card.runtime)

        taken = medians({"write": partial(card.seconds, all_layers)}, sizes.rounds)["write"]
        yield Row(
            name=f"write of K and V, {count:,} tokens, one layer",
            group="attention",
            value=taken / model.layers * 1e6,
            unit="us",
            note="scattered slots, rotary embedding of K included; every layer writes the same K "
            "and V, which it finds in the L2 cache, as right after their projection",
        )

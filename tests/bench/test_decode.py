"""What has to have happened for a figure of decoding to count."""

from __future__ import annotations

import pytest

from kvstore import compose
from kvstore.bench import decode
from kvstore.bench.asking import fresh_tokens
from kvstore.bench.benchmark import Bench
from kvstore.bench.rows import Row
from kvstore.bench.sizes import TINY
from kvstore.engine.naming import namespace_of
from kvstore.hashing import TokenChain
from kvstore.store import BlockStore


def test_every_block_that_fills_is_offloaded(bench: Bench) -> None:
    (row,) = decode.measure_offload(bench)
    assert isinstance(row, Row)
    # Of 60 tokens asked and 30 answered 89 have KV; 6 answers while prompts are read, two rounds.
    assert row.note.startswith(f"all {2 * TINY.decode_batch * 5} blocks")


def test_a_store_that_takes_but_a_part_makes_no_figure(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whose RAM somebody else has all but a block."""
    original, hoards = compose.open, []
    namespace = namespace_of(bench.model, bench.dtype, block_tokens=TINY.block_tokens)

    def full(*, ram_bytes: int) -> BlockStore:
        store = original(ram_bytes=1 << 20)
        blocks = (1 << 20) // namespace.layout.block_bytes - 1
        tokens = fresh_tokens(TINY.model.vocab_size, blocks * TINY.block_tokens)
        hoards.append(store.reserve(TokenChain(namespace, tokens).chain()))
        return store

    monkeypatch.setattr(compose, "open", full)
    with pytest.raises(RuntimeError, match="blocks were offloaded, and 30 had become full"):
        list(decode.measure_offload(bench))

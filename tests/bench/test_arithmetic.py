"""From seconds to figures: on a card for which everything takes exactly one second."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest
import torch

from kvstore.bench import asking, copies, decode
from kvstore.bench.attention import measure, measure_writes
from kvstore.bench.benchmark import Bench
from kvstore.bench.card import Work
from kvstore.bench.rows import Row
from kvstore.bench.sizes import TINY, TINY_MODEL, pair_bytes, token_bytes
from kvstore.engine.engine import Engine
from tests.bench.cpu_card import CpuCard


class OneSecond(CpuCard):
    def seconds(self, work: Work) -> float:
        work()
        return 1.0

    def seconds_at_once(self, works: Sequence[Work]) -> float:
        super().seconds_at_once(works)
        return 1.0

    def seconds_beside(self, work: Work, company: Sequence[Work]) -> float:
        super().seconds_beside(work, company)
        return 2.0


@pytest.fixture
def slow(card: CpuCard, tmp_path: Path) -> Bench:
    return Bench(OneSecond(card.runtime), TINY, tmp_path)


def gigabytes(nbytes: int) -> object:
    return pytest.approx(nbytes / 1e9)


def test_copies(slow: Bench) -> None:
    rows = {row.name: row for row in copies.measure(slow, 16) if isinstance(row, Row)}
    block_bytes = 16 * token_bytes(TINY_MODEL, 2)
    total_bytes = TINY.copy_bytes // block_bytes * block_bytes
    for to in ("to", "from"):
        for way in ("kernel", "DMA"):
            row = rows[f"pages {to} RAM by {way}, 16-token blocks"]
            assert (row.value, row.ceiling) == (gigabytes(total_bytes), gigabytes(total_bytes))
    both = rows["pages both ways at once by kernel, 16-token blocks"]
    assert (both.value, both.ceiling) == (gigabytes(2 * total_bytes),) * 2


def test_decode_beside_copies(slow: Bench) -> None:
    """A whole step: a token of each sequence in a second, and in two beside copies."""
    rows = [row for row in decode.measure_beside(slow) if isinstance(row, Row)]
    assert [(row.value, row.ceiling) for row in rows] == [
        (TINY.beside.batch / 2, TINY.beside.batch)
    ] * 3
    assert [row.ok for row in rows] == [False] * 3


@pytest.mark.parametrize(("name", "element_bytes"), [("bfloat16", 2), ("float8_e4m3fn", 1)])
def test_attention(slow: Bench, name: str, element_bytes: int) -> None:
    rows = [row for row in measure(slow, getattr(torch, name)) if isinstance(row, Row)]
    alone = [row for row in rows if "beside" not in row.name]
    for row, (batch, context) in zip(alone, TINY.decode_shapes, strict=True):
        # The second is that of all layers.
        read_bytes = TINY_MODEL.layers * batch * context * pair_bytes(TINY_MODEL, element_bytes)
        assert row.value == gigabytes(read_bytes)
        assert row.ceiling == gigabytes(2 * TINY.device_copy_bytes)
    # A second for as many calls of the peer's as there are layers.
    assert all(row.ratio == pytest.approx(1.0) for row in rows if "beside" in row.name)


def test_writes(slow: Bench) -> None:
    rows = [row for row in measure_writes(slow) if isinstance(row, Row)]
    assert [row.value for row in rows] == [pytest.approx(1e6 / TINY_MODEL.layers)] * 2


def test_a_token_of_a_full_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count(100.0)  # looked at twice, at the beginning and at the end
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    prompts = [asking.fresh_tokens(TINY_MODEL.vocab_size, 40) for _ in range(3)]
    with Engine(bench.model, hbm_bytes="4 MiB", prefill_chunk_tokens=64) as engine:
        # A prompt a step: the first answer has 3 of its 12 tokens when the last begins.
        assert asking.seconds_a_token(engine, prompts, 12) == pytest.approx(1 / (3 * 9))
        assert next(clock) == 102.0
        assert not engine.busy
        with pytest.raises(RuntimeError, match="the first answer was over"):
            asking.seconds_a_token(engine, prompts, 1)


def test_prompts_are_never_the_same() -> None:
    first, second = (asking.fresh_tokens(1000, 50) for _ in range(2))
    assert first != second
    assert len(first) == 50
    assert min(first) >= 0
    assert max(first) < 1000

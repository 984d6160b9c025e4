"""What has to have happened for a figure of decoding to count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore import compose
from kvstore.bench import decode
from kvstore.bench.asking import fresh_tokens
from kvstore.bench.benchmark import Bench
from kvstore.bench.card import Work
from kvstore.bench.rows import Row, Unmeasured
from kvstore.bench.sizes import TINY
from kvstore.engine.decode_steps import Capture
from kvstore.engine.naming import namespace_of
from kvstore.hashing import TokenChain
from kvstore.kernels.cuda_module import Runtime
from kvstore.store import BlockStore
from tests.bench.cpu_card import CpuCard


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


class Noting(CpuCard):
    """Of what is measured: results, how much runs beside them, and whether it was captured."""

    def __init__(self, runtime: Runtime | None) -> None:
        super().__init__(runtime)
        self.replayed = 0
        self.beside: list[tuple[torch.Size, int, int]] = []

    def capture(self) -> Capture:
        def replays(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
            def replay() -> Tensor:
                self.replayed += 1
                return compute()

            return replay

        return replays

    def seconds_beside(self, work: Work, company: Sequence[Work]) -> float:
        before, logits = self.replayed, work()
        assert isinstance(logits, Tensor)
        self.beside.append((logits.shape, self.replayed - before, len(company)))
        return super().seconds_beside(work, company)


def test_beside_copies_a_graph_is_replayed_in_which_all_decode(
    card: CpuCard, tmp_path: Path
) -> None:
    noting = Noting(card.runtime)
    assert len(list(decode.measure_beside(Bench(noting, TINY, tmp_path)))) == 3
    logits = torch.Size((TINY.beside.batch, TINY.model.vocab_size))
    # To RAM, from it, and both; each a round that is dropped, and one that counts.
    assert noting.beside == [(logits, 1, company) for company in (1, 1, 1, 1, 2, 2)]


class OneWayOnly(CpuCard):
    """Beside copies both ways at once nothing can be measured."""

    def seconds_beside(self, work: Work, company: Sequence[Work]) -> float:
        if len(company) == 2:
            raise RuntimeError("ended first")
        return super().seconds_beside(work, company)


def test_of_what_runs_beside_one_that_breaks_costs_its_own_row_alone(
    card: CpuCard, tmp_path: Path
) -> None:
    *rows, said = decode.measure_beside(Bench(OneWayOnly(card.runtime), TINY, tmp_path))
    assert [type(row) for row in rows] == [Row, Row]
    assert said == Unmeasured(
        "decode steps beside pages both ways", "failed", "RuntimeError: ended first"
    )

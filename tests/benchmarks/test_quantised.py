"""The figures of quantised KV: what they are made of, and every row on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import quantised
from benchmarks.harness import QUICK, Bench
from tests.engine.tiny import tiny_model


def test_errors_are_what_they_are_called() -> None:
    right = torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 0.0]])
    logits = torch.tensor([[0.0, 3.0, 2.0], [5.0, 0.0, 0.5]])
    wrong = quantised.Error()
    wrong.add(logits[:1], right[:1], [2])
    wrong.add(logits[1:], right[1:], [])
    assert (wrong.positions, wrong.agreement, wrong.largest) == (2, 0.5, 2.0)
    assert wrong.mean == pytest.approx((2 / 3 + 0.5 / 3) / 2)
    sums = [sum(math.exp(x) for x in row) for row in (right[0].tolist(), logits[0].tolist())]
    likely = [math.exp(x) / sums[0] for x in right[0].tolist()]
    # The likelihoods of the two differ by the sums and, in the second place, by the logit.
    first = math.log(sums[1] / sums[0]) - 2 * likely[1]
    assert wrong.divergences[0] == pytest.approx(first, rel=1e-5)
    assert wrong.losses == pytest.approx([math.log(sums[1]) - 2])
    assert wrong.losses_of_right == pytest.approx([math.log(sums[0]) - 2])


def test_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSTORE_BENCH_MODEL", str(tiny_model(tmp_path / "tiny")))
    rows = list(quantised.measure(Bench(QUICK, tmp_path)))
    assert len({row.name for row in rows}) == 12
    by_name = {row.name: row for row in rows}
    for name in ("fp8", "int8"):
        agreement = by_name[f"KV as {name}: same next token as bf16"]
        assert 50 < agreement.value < 100
        assert agreement.note.startswith("600 positions of README.md")
        assert agreement.ceiling is not None
        assert agreement.ceiling > agreement.value
        error = by_name[f"KV as {name}: logits beside bf16, mean error"]
        assert error.ratio is not None
        assert error.ratio > 1

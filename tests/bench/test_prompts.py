"""Which engine's time to the first token is set against which."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvstore.bench import asking, prompts
from kvstore.bench.benchmark import Bench
from kvstore.bench.rows import NotHereError, Row, Unmeasured
from kvstore.bench.sizes import TINY
from kvstore.engine.engine import Engine
from kvstore.engine.output import Usage
from kvstore.store import BlockStore
from tests.bench.cpu_card import CpuCard

# 4 layers, whose matrices have 67,584 numbers, and 513 * 514 / 2 pairs of 4 heads of 64.
FLOPS = 4 * (2 * 67_584 * 513 + 4 * 131_841 * 256)

Asked = list[tuple[bool, Usage]]  # whether the engine has a store


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """All that engines are asked for their first token, in order."""
    noted: Asked = []
    without: list[Engine] = []

    class Noted(Engine):
        def __init__(self, *args: Any, store: Any, **more: Any) -> None:
            super().__init__(*args, store=store, **more)
            if store is None:
                without.append(self)

    def first_token(engine: Engine, prompt: Sequence[int]) -> Usage:
        usage = asking.first_token(engine, prompt)
        noted.append((engine not in without, usage))
        return usage

    monkeypatch.setattr(prompts, "Engine", Noted)
    monkeypatch.setattr(prompts, "first_token", first_token)
    return noted


def rows_of(measured: Iterator[Row | Unmeasured]) -> list[Row]:
    rows = list(measured)
    assert all(isinstance(row, Row) for row in rows)
    return [row for row in rows if isinstance(row, Row)]


def test_the_ceiling_is_computed_without_a_store(bench: Bench, asked: Asked) -> None:
    computed, ram, half = rows_of(prompts.measure_ram(bench))
    (without,) = [usage for has_store, usage in asked if not has_store][1:]  # one is dropped
    assert without.recomputed_tokens == TINY.prompt_tokens + 1
    assert computed.value == ram.ceiling == half.ceiling == without.ttft_s * 1e3
    assert computed.note.startswith(f"{513 / without.ttft_s:,.0f} tokens/s, ")
    assert computed.note.endswith(f"{FLOPS / without.ttft_s / 1e12:.3g} TFLOP/s")
    ram_usage, half_usage = [usage for has_store, usage in asked if has_store][-2:]
    assert (ram_usage.ram_tokens, half_usage.ram_tokens) == (512, 256)
    assert (ram.value, half.value) == (ram_usage.ttft_s * 1e3, half_usage.ttft_s * 1e3)


@pytest.mark.usefixtures("o_direct")
def test_both_at_once_is_set_against_the_quicker_of_either(bench: Bench, asked: Asked) -> None:
    loaded, both = rows_of(prompts.measure_nvme(bench))
    (without,) = [usage for has_store, usage in asked if not has_store][2:]  # one warms up
    assert (loaded.at_most, both.at_most) == (1.15, 0.65)
    assert both.ceiling == min(loaded.value, without.ttft_s * 1e3)
    assert "at once" in both.name


def test_what_may_come_from_ram_is_no_figure_of_the_drive(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that refuses O_DIRECT."""
    original = os.open

    def refusing(path: Path, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError("no O_DIRECT here")
        return original(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(NotHereError, match="O_DIRECT is refused"):
        list(prompts.measure_nvme(bench))


@pytest.mark.usefixtures("o_direct")
@pytest.mark.parametrize("left_s", [0.0, 60.0])
def test_a_drive_that_is_too_slow_for_the_time_that_is_left(
    card: CpuCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_s: float
) -> None:
    """It is found out before a prompt is written."""
    flushed: list[float | None] = []

    def flush(store: BlockStore, timeout_s: float | None = None) -> bool:
        flushed.append(timeout_s)
        return original(store, timeout_s)

    original = BlockStore.flush
    monkeypatch.setattr(BlockStore, "flush", flush)
    late = Bench(card, dataclasses.replace(TINY, time_limit_s=left_s), tmp_path)
    if left_s:
        assert len(rows_of(prompts.measure_nvme(late))) == 2
    else:
        with pytest.raises(NotHereError, match=r"needs \d+ s where the drive is read at .* 0 s"):
            list(prompts.measure_nvme(late))
    assert bool(flushed) is bool(left_s)

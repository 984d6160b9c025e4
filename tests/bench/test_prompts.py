"""Which engine's time to the first token is set against which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from kvstore.bench import asking, prompts
from kvstore.bench.benchmark import Bench
from kvstore.bench.sizes import TINY
from kvstore.engine.engine import Engine
from kvstore.engine.output import Usage

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


def test_the_ceiling_is_computed_without_a_store(bench: Bench, asked: Asked) -> None:
    computed, ram, half = prompts.measure_ram(bench)
    (without,) = [usage for has_store, usage in asked if not has_store][1:]  # one is dropped
    assert without.recomputed_tokens == TINY.prompt_tokens + 1
    assert computed.value == ram.ceiling == half.ceiling == without.ttft_s * 1e3
    ram_usage, half_usage = [usage for has_store, usage in asked if has_store][-2:]
    assert (ram_usage.ram_tokens, half_usage.ram_tokens) == (512, 256)
    assert (ram.value, half.value) == (ram_usage.ttft_s * 1e3, half_usage.ttft_s * 1e3)


def test_both_at_once_is_set_against_the_quicker_of_either(bench: Bench, asked: Asked) -> None:
    loaded, both = prompts.measure_nvme(bench)
    (without,) = [usage for has_store, usage in asked if not has_store][2:]  # one warms up
    assert (loaded.at_most, both.at_most) == (1.15, 0.65)
    assert both.ceiling == min(loaded.value, without.ttft_s * 1e3)
    assert "at once" in both.name

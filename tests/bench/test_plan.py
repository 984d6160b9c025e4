"""A full run is planned for 8 minutes on an H100: what each part should take, from its sizes.

The rates are cautious guesses of what such a machine does; none has been measured. What is
tested is that nobody makes a part longer and leaves no time for the last.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvstore.bench.gpu import catalogue
from kvstore.bench.sizes import FULL, Sizes, token_bytes, weight_count

LIMIT_S = 8 * 60

_MATMUL_FLOPS, _ATTENTION_FLOPS = 350e12, 200e12
_HBM_BYTES_PER_S, _BUS_BYTES_PER_S, _DRIVE_BYTES_PER_S = 2.5e12, 40e9, 1.5e9
_PINNED_BYTES_PER_S = 2.5e9  # mapped, zeroed and registered
_COMPILED_S, _MODEL_S, _ENGINE_S = 30.0, 5.0, 5.0  # once; once; each, with its graphs
_EAGER_S, _TURN_S = 0.04, 0.03  # a step that is launched kernel by kernel; a head start, a wait


def _prompt_s(sizes: Sizes, tokens: int) -> float:
    model = sizes.model
    pairs = tokens * tokens / 2
    attention = 4 * pairs * model.query_size * model.layers / _ATTENTION_FLOPS
    return 2 * weight_count(model) * tokens / _MATMUL_FLOPS + attention


def _step_s(sizes: Sizes, batch: int, context: int) -> float:
    read_bytes = 2 * weight_count(sizes.model) + batch * context * token_bytes(sizes.model, 2)
    return read_bytes / _HBM_BYTES_PER_S + 2e-3


def _copies_s(sizes: Sizes) -> float:
    turn_s = sizes.copy_bytes / _BUS_BYTES_PER_S + _TURN_S
    return 2 * sizes.copy_bytes / _PINNED_BYTES_PER_S + (sizes.rounds + 2) * 8 * turn_s


def _attention_s(sizes: Sizes) -> float:
    return 5 + (sizes.rounds + 1) * 2 * 4 * 2 * _TURN_S


def _graphs_s(sizes: Sizes) -> float:
    steps = (sizes.engine_rounds + 1) * len(sizes.step_batches) * sizes.steps
    return _MODEL_S + _ENGINE_S + steps * 1.5 * _EAGER_S


def _beside_s(sizes: Sizes) -> float:
    step_s = _step_s(sizes, *sizes.beside)
    # Before each its copies are timed three times; some more of them than needed are started.
    beside_s = step_s + 9 * (_TURN_S + sizes.copy_bytes / _BUS_BYTES_PER_S)
    return _ENGINE_S + _copies_s(sizes) / 2 + 3 * (sizes.rounds + 1) * (step_s + beside_s)


def _offload_s(sizes: Sizes) -> float:
    reading = sizes.decode_batch + sizes.decode_batch * sizes.decode_prompt_tokens // (
        sizes.chunk_tokens
    )
    step_s = _step_s(sizes, sizes.decode_batch, sizes.decode_prompt_tokens + sizes.decode_tokens)
    turn_s = reading * (_EAGER_S + step_s) + sizes.decode_tokens * step_s
    return 2 * _ENGINE_S + 2 * (sizes.engine_rounds + 1) * turn_s


def _ram_s(sizes: Sizes) -> float:
    computed_s = _prompt_s(sizes, sizes.prompt_tokens)
    nbytes = sizes.prompt_tokens * token_bytes(sizes.model, 2)
    turns_s = 1.7 * computed_s + 2 * nbytes / _BUS_BYTES_PER_S
    starts_s = 2 * _ENGINE_S + 1.5 * nbytes / _PINNED_BYTES_PER_S
    return starts_s + computed_s + (sizes.prompt_rounds + 1) * turns_s


def _nvme_s(sizes: Sizes) -> float:
    computed_s = _prompt_s(sizes, sizes.prompt_tokens)
    nbytes = sizes.prompt_tokens * token_bytes(sizes.model, 2)
    drive_s, read_s = sizes.drive_bytes / _DRIVE_BYTES_PER_S, nbytes / _DRIVE_BYTES_PER_S
    starts_s = 3 * _ENGINE_S + 3 * computed_s + 2 * read_s + 3 * drive_s
    # Two are loaded, and what was not loaded of the other may come to RAM.
    return starts_s + (sizes.prompt_rounds + 1) * (drive_s + 3 * read_s + computed_s)


def _sessions_s(sizes: Sizes) -> float:
    session_bytes = sizes.session_tokens * token_bytes(sizes.model, 2)
    ram_s = sizes.sessions * session_bytes * 9 / 8 / _PINNED_BYTES_PER_S
    computed_s = _prompt_s(sizes, sizes.session_tokens)
    taken_s = ram_s + 2 * _ENGINE_S + sizes.sessions * computed_s
    for answers in sizes.answers:
        for at_once in answers.at_once:
            step_s = _step_s(sizes, at_once, sizes.session_tokens)
            first_s = at_once * (computed_s + _EAGER_S) + 2 * answers.tokens * step_s
            turn_s = computed_s + _EAGER_S + answers.tokens * step_s / at_once
            without_s = max(sizes.session_run_s, max(sizes.session_turns, 2 * at_once) * turn_s)
            taken_s += first_s + without_s + sizes.session_run_s
    return taken_s


_PARTS: dict[str, Callable[[Sizes], float]] = {
    "attention/bf16": _attention_s,
    "attention/fp8": _attention_s,
    "attention/write": lambda sizes: 2.0,
    "decode/graphs": _graphs_s,
    "decode/beside": _beside_s,
    "decode/offload": _offload_s,
    "prompts/ram": _ram_s,
    "prompts/nvme": _nvme_s,
    "sessions": _sessions_s,
}


def test_a_full_run_is_planned_for_less_than_its_limit() -> None:
    planned_s = {
        each.name: (_copies_s if each.name.startswith("copies/") else _PARTS[each.name])(FULL)
        for each in catalogue(FULL)
    }
    *before, last = planned_s
    assert last == "sessions"
    begins_s = _COMPILED_S + sum(planned_s[name] for name in before)
    said = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in planned_s.items())
    assert begins_s + planned_s[last] < LIMIT_S, said
    assert begins_s < FULL.time_limit_s, f"there is no time for {last}: {said}"
    assert FULL.time_limit_s + planned_s[last] < LIMIT_S, f"{last} may begin too late: {said}"


def test_a_prompt_of_8_ki_tokens_takes_half_a_second() -> None:
    assert _prompt_s(FULL, 8192) == pytest.approx(0.5, abs=0.1)
    assert _prompt_s(FULL, 32_768) == pytest.approx(3.0, abs=0.3)
    assert _step_s(FULL, 64, 4096) == pytest.approx(0.022, abs=0.002)

"""Time to first token of one long prompt: computed, from RAM, from NVMe, and in company.

A prompt has one token more than its blocks hold, so that one token is computed when all blocks
are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial

from kvstore import compose
from kvstore.bench.asking import first_token, fresh_tokens
from kvstore.bench.benchmark import Bench
from kvstore.bench.drive import Drive, reading
from kvstore.bench.rows import NotHereError, Row, Unmeasured
from kvstore.bench.sizes import prompt_flops, token_bytes
from kvstore.bench.turns import Turn, medians
from kvstore.engine.engine import Engine
from kvstore.engine.output import Usage
from kvstore.hashing import Chain, TokenChain
from kvstore.quantities import format_size
from kvstore.verbs import Store

RAM_AT_MOST, NVME_AT_MOST, BOTH_AT_MOST = 0.10, 1.15, 0.65
_FLUSH_S = 120.0


def measure_ram(bench: Bench) -> Iterator[Row | Unmeasured]:
    """From RAM, all of it or the leading half, beside an engine that has no store."""
    prompt_bytes = _prompt_bytes(bench)
    ram_bytes = prompt_bytes * 3 // 2
    bench.need_engine(hbm_bytes=2 * _hbm_bytes(bench), ram_bytes=2 * ram_bytes)
    prompt = _new_prompt(bench)
    with ExitStack() as stack:
        store = stack.enter_context(compose.open(ram_bytes=ram_bytes))
        yield from bench.pin(store, "prompts from RAM")
        engine = stack.enter_context(_engine(bench, store))
        computing = stack.enter_context(_engine(bench, None))
        first_token(engine, prompt)
        found = _InRam(bench, engine, store, prompt)
        turns: dict[str, Turn] = {
            "computed": partial(_compute, computing, prompt),
            "ram": found.all_of_it,
            "half": found.half,
        }
        in_ms = {name: s * 1e3 for name, s in medians(turns, bench.sizes.prompt_rounds).items()}
    name = _name(bench)
    rate = prompt_bytes / in_ms["ram"] / 1e6
    computed = "the same prompt computed by an engine without a store"
    flops = prompt_flops(bench.sizes.model, len(prompt))
    yield Row(
        name=f"{name}, computed without a store",
        group="prompts",
        value=in_ms["computed"],
        unit="ms",
        note=f"{len(prompt) / in_ms['computed'] * 1e3:,.0f} tokens/s, "
        f"{flops / in_ms['computed'] / 1e9:.3g} TFLOP/s",
    )
    yield Row(
        name=f"{name}, from RAM",
        group="prompts",
        value=in_ms["ram"],
        unit="ms",
        ceiling=in_ms["computed"],
        against=computed,
        at_most=RAM_AT_MOST,
        note=f"{format_size(prompt_bytes)}, {rate:.1f} GB/s from arrival to first token",
    )
    yield Row(
        name=f"{name}, leading half from RAM and then the rest computed",
        group="prompts",
        value=in_ms["half"],
        unit="ms",
        ceiling=in_ms["computed"],
        against=computed,
        note="one after the other: nothing can be computed before what it attends to",
    )


class _InRam:
    """A prompt that the store has in RAM, asked for again and again."""

    def __init__(self, bench: Bench, engine: Engine, store: Store, prompt: list[int]) -> None:
        self._block_tokens = bench.sizes.block_tokens
        self._engine, self._store, self._prompt = engine, store, prompt

    def all_of_it(self) -> float:
        return self._ask(ram_tokens=len(self._prompt) - 1)

    def half(self) -> float:
        """Computes the rest, which is in RAM again afterwards."""
        chain = _chain(self._engine, self._prompt)
        half = len(chain) // 2
        self._store.evict(chain.slice(half))
        return self._ask(ram_tokens=half * self._block_tokens)

    def _ask(self, ram_tokens: int) -> float:
        self._engine.clear_hbm()
        usage = first_token(self._engine, self._prompt)
        if usage.ram_tokens != ram_tokens:
            raise RuntimeError(f"{ram_tokens} tokens should have come from RAM: {usage}")
        return usage.ttft_s


def measure_nvme(bench: Bench) -> Iterator[Row | Unmeasured]:
    """From NVMe, beside the drive; and loaded and computed at once, beside either alone.

    RAM has room for one prompt. What is asked for lies on NVMe alone, since another prompt has
    taken its place in RAM.
    """
    sizes, prompt_bytes = bench.sizes, _prompt_bytes(bench)
    nvme_bytes = prompt_bytes * 9 // 4 + (64 << 20)
    bench.need_engine(
        hbm_bytes=3 * _hbm_bytes(bench),
        ram_bytes=2 * prompt_bytes,
        disk_bytes=nvme_bytes + sizes.drive_bytes,
    )
    prompts = [_new_prompt(bench), _new_prompt(bench)]
    with ExitStack() as stack:
        drive = stack.enter_context(reading(bench.directory, sizes.drive_bytes))
        if not drive.direct:
            raise NotHereError(
                f"O_DIRECT is refused on the drive of {bench.directory}: what is read there may "
                "come from RAM"
            )
        store = stack.enter_context(
            compose.open(
                ram_bytes=prompt_bytes,
                nvme_path=bench.directory / "nvme",
                nvme_bytes=nvme_bytes,
            )
        )
        yield from bench.pin(store, "prompts from NVMe")
        # One that never learns how fast it computes, and so loads all there is; one that
        # knows, and chooses; and one that has nothing to load from.
        loading = stack.enter_context(_engine(bench, store))
        choosing = stack.enter_context(_engine(bench, store))
        computing = stack.enter_context(_engine(bench, None))
        _must_fit(bench, drive, _compute(computing, prompts[0]))
        for prompt in prompts:
            first_token(choosing, prompt)
            if not store.flush(_FLUSH_S):
                raise RuntimeError(f"the prompt was not on the drive after {_FLUSH_S:.0f} s")
        cold = _Cold(store, loading, prompts)
        choices: list[Usage] = []
        turns: dict[str, Turn] = {
            "drive": drive.seconds,
            "load": partial(cold.ask, loading, []),
            "choose": partial(cold.ask, choosing, choices),
            "compute": partial(_compute, computing, prompts[0]),
        }
        seconds = medians(turns, sizes.prompt_rounds)
    if cold.least_nvme_tokens < sizes.prompt_tokens:
        raise RuntimeError(f"only {cold.least_nvme_tokens} tokens came from NVMe")
    yield from _nvme_rows(bench, drive, seconds, choices[-1])


def _must_fit(bench: Bench, drive: Drive, computed_s: float) -> None:
    """Raises NotHereError where what comes would leave no time for the benchmarks after it."""
    sizes, prompt_bytes = bench.sizes, _prompt_bytes(bench)
    turns = sizes.prompt_rounds + 1
    # In each a prompt is loaded twice, and what was not loaded of the other may come to RAM.
    read_bytes = turns * (drive.total_bytes + 3 * prompt_bytes)
    read_s = read_bytes / drive.read_bytes_per_s
    written_s = 2 * prompt_bytes / drive.write_bytes_per_s
    needed_s = read_s + written_s + (turns + 2) * computed_s
    if needed_s > bench.left_s:
        raise NotHereError(
            f"needs {needed_s:.0f} s where the drive is read at "
            f"{drive.read_bytes_per_s / 1e9:.2f} GB/s and written at "
            f"{drive.write_bytes_per_s / 1e9:.2f}; {max(0.0, bench.left_s):.0f} s are left"
        )


class _Cold:
    """Prompts of which one is in RAM, and the other is asked for."""

    def __init__(self, store: Store, loading: Engine, prompts: Sequence[list[int]]) -> None:
        self._store, self._loading = store, loading
        self._prompts = list(prompts)  # the first is the next
        self.least_nvme_tokens = len(prompts[0])  # of what the loading engine was asked for

    def ask(self, engine: Engine, usages: list[Usage]) -> float:
        prompt, other = self._prompts
        with self._store.acquire(_chain(engine, other)) as lease:
            lease.wait()  # takes the other's place in RAM, unless it was asked for last
        engine.clear_hbm()
        usage = first_token(engine, prompt)
        self._prompts.reverse()
        usages.append(usage)
        if engine is self._loading:
            self.least_nvme_tokens = min(self.least_nvme_tokens, usage.nvme_tokens)
        return usage.ttft_s


def _compute(engine: Engine, prompt: list[int]) -> float:
    engine.clear_hbm()
    return first_token(engine, prompt).ttft_s


def _nvme_rows(
    bench: Bench, drive: Drive, seconds: dict[str, float], choice: Usage
) -> Iterator[Row]:
    prompt_bytes, name = _prompt_bytes(bench), _name(bench)
    rate = drive.total_bytes / seconds["drive"]
    loaded, computed = seconds["load"], seconds["compute"]
    alone = min(loaded, computed)
    ideal = loaded * computed / (loaded + computed)
    yield Row(
        name=f"{name}, from NVMe",
        group="prompts",
        value=seconds["load"] * 1e3,
        unit="ms",
        ceiling=prompt_bytes / rate * 1e3,
        against=f"its {format_size(prompt_bytes)} at {rate / 1e9:.2f} GB/s: {drive.about}",
        at_most=NVME_AT_MOST,
        note="checksums are verified",
    )
    yield Row(
        name=f"{name}, loaded from NVMe and computed at once",
        group="prompts",
        value=seconds["choose"] * 1e3,
        unit="ms",
        ceiling=alone * 1e3,
        against=f"the quicker of both alone: loading {loaded * 1e3:,.0f} ms, "
        f"computing {computed * 1e3:,.0f} ms",
        at_most=BOTH_AT_MOST,
        note=f"{ideal / alone:.2f} if neither held up the other, and all tokens were alike; the "
        f"last time {choice.nvme_tokens} came from NVMe, {choice.ram_tokens} from RAM, and "
        f"{choice.recomputed_tokens} were computed",
    )


def _engine(bench: Bench, store: Store | None) -> Engine:
    sizes = bench.sizes
    return Engine(
        bench.model,
        store=store,
        hbm_bytes=_hbm_bytes(bench),
        block_tokens=sizes.block_tokens,
        max_batch=1,
        prefill_chunk_tokens=sizes.chunk_tokens,
    )


def _hbm_bytes(bench: Bench) -> int:
    """Of one engine: a prompt, and a few blocks."""
    sizes = bench.sizes
    more = 8 * sizes.block_tokens
    return (sizes.prompt_tokens + more) * token_bytes(sizes.model, bench.dtype.itemsize)


def _prompt_bytes(bench: Bench) -> int:
    return bench.sizes.prompt_tokens * token_bytes(bench.sizes.model, bench.dtype.itemsize)


def _new_prompt(bench: Bench) -> list[int]:
    return fresh_tokens(bench.sizes.model.vocab_size, bench.sizes.prompt_tokens + 1)


def _chain(engine: Engine, prompt: Sequence[int]) -> Chain:
    return TokenChain(engine.namespace, prompt).chain()


def _name(bench: Bench) -> str:
    return f"TTFT of {bench.sizes.prompt_tokens:,} tokens"

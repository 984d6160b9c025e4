"""Prompts that are computed from the front while their later blocks are loaded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore.engine.engine import Engine
from kvstore.engine.loading import LoadedModel
from kvstore.engine.offload import Offload
from kvstore.engine.sampling import SamplingParams
from kvstore.hashing import TokenChain
from kvstore.planner import LinearCost
from kvstore.store import BlockStore
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.ram import RamTier
from tests.engine.delayed import ALWAYS, NEVER, DelayedCopies
from tests.engine.reference import (
    BLOCK_TOKENS,
    GREEDY,
    LONG,
    PROMPTS,
    block_bytes,
    check,
    drain,
    engine_over,
    sources,
)
from tests.engine.traffic import Traffic

BLOCK_S = 10.0  # to load a block, or to compute one: they meet half way, at block 6 of LONG's 12
ONCE = SamplingParams(max_tokens=1)


class Fixed(LinearCost):
    """A speed that nobody can talk it out of."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        LinearCost.observe(self, 1, 0, a)
        LinearCost.observe(self, 0, 1, b)

    def observe(self, x: float, y: float, seconds: float) -> None:
        pass


@contextmanager
def slow_store(model: LoadedModel, folder: Path, ram_bytes: int = 4 << 20) -> Iterator[BlockStore]:
    """With a drive that is said to take as long for a block as it takes to compute one."""
    nvme = NvmeTier(folder, 16 << 20, driver="threads", now_s=time.time)
    with BlockStore(RamTier(ram_bytes), nvme) as store:
        costs = store.load_costs
        assert isinstance(costs, dict)
        costs["nvme"] = Fixed(0, BLOCK_S / block_bytes(model))
        yield store


def knowing(engine: Engine) -> Engine:
    offload = engine._loop._offload
    assert isinstance(offload, Offload)
    offload._prefill = Fixed(BLOCK_S / BLOCK_TOKENS, 0)
    return engine


def arrive(store: BlockStore, engine: Engine) -> None:
    """Have the second half of LONG in RAM."""
    with store.acquire(TokenChain(engine.namespace, LONG).chain(6, 12)) as lease:
        assert lease.wait() == 6


@pytest.fixture
def stored(tiny: LoadedModel, tmp_path: Path) -> Path:
    """A folder with the blocks of every prompt, and none of them in RAM."""
    with slow_store(tiny, tmp_path) as store, engine_over(tiny, store) as engine:
        engine.generate(PROMPTS, ONCE)
    return tmp_path


def test_both_halves_meet(tiny: LoadedModel, expected: list[tuple[int, ...]], stored: Path) -> None:
    with slow_store(tiny, stored) as store, engine_over(tiny, store) as engine:
        outputs = knowing(engine).generate([LONG], GREEDY)
        check(outputs, expected[:1])
        assert sources(outputs[0].usage) == (0, 0, 24, 0, 26)
        assert engine.stats().counters["met_blocks"] == 6
        assert engine.stats().counters["loaded_blocks"] == 6
        store.flush()  # what is being written is pinned
        assert store.stats().ram["pinned_blocks"] == 0


def test_what_ram_and_hbm_have_comes_first(
    tiny: LoadedModel, expected: list[tuple[int, ...]], stored: Path
) -> None:
    with slow_store(tiny, stored) as store, engine_over(tiny, store) as engine:
        engine.generate([LONG[:21]], ONCE)  # five blocks into RAM
        engine.clear_hbm()
        engine.generate([LONG[:9]], ONCE)  # two of them into HBM
        outputs = knowing(engine).generate([LONG], GREEDY)
        check(outputs, expected[:1])
        # Of the seven that are left three are computed: a tie goes to less computing.
        assert sources(outputs[0].usage) == (8, 12, 16, 0, 14)


def test_who_is_not_alone_loads_it_all(
    tiny: LoadedModel, expected: list[tuple[int, ...]], stored: Path
) -> None:
    with slow_store(tiny, stored) as store, engine_over(tiny, store) as engine:
        outputs = knowing(engine).generate([LONG, [3, 1, 4]], GREEDY)
        check(outputs[:1], expected[:1])
        assert "met_blocks" not in engine.stats().counters


def test_nothing_is_computed_over_what_is_on_its_way(
    tiny: LoadedModel, expected: list[tuple[int, ...]], stored: Path
) -> None:
    """The copies notice if their blocks are read or written too early."""
    with slow_store(tiny, stored) as store, engine_over(tiny, store) as engine:
        copies = DelayedCopies(knowing(engine)._loop.hbm, NEVER)
        request = engine.add_request(LONG, GREEDY)
        engine.step()  # 16 tokens
        arrive(store, engine)
        engine.step()  # 8 tokens, up to the blocks whose copy has begun
        leader = engine._loop.requests[request].leader
        assert (leader.computed_tokens, len(copies.inward), copies.waits) == (24, 1, 0)
        copies.inward[0].run()
        deltas = engine.step()  # the copy was over: the last two tokens of the prompt
        assert len(deltas) == 1
        deltas += drain(engine)
        assert tuple(t for delta in deltas for t in delta.token_ids) == expected[0]


def test_blocks_that_come_early_wait_for_those_before_them(
    tiny: LoadedModel, expected: list[tuple[int, ...]], stored: Path
) -> None:
    with (
        slow_store(tiny, stored) as store,
        engine_over(tiny, store, prefill_chunk_tokens=8) as engine,
    ):
        copies = DelayedCopies(knowing(engine)._loop.hbm, ALWAYS)
        request = engine.add_request(LONG, GREEDY)
        engine.step()
        arrive(store, engine)
        reached = []
        for _ in range(2):
            engine.step()
            if copies.inward:
                copies.inward[0].run()
            reached.append(engine._loop.requests[request].leader.computed_tokens)
        assert reached == [16, 24]
        deltas = drain(engine)
        assert tuple(t for delta in deltas for t in delta.token_ids) == expected[0]
        assert copies.preceded == 0, "a copy layer by layer is for who reads it at once"


def test_what_does_not_come_is_computed(
    tiny: LoadedModel, expected: list[tuple[int, ...]], stored: Path
) -> None:
    with (
        slow_store(tiny, stored) as store,
        engine_over(tiny, store) as engine,
        store.acquire(TokenChain(engine.namespace, LONG).chain(8, 9)) as lease,
    ):
        assert lease.wait() == 1
        block = bytes(lease.views[0])
    slab = stored / "slab"
    data = bytearray(slab.read_bytes())
    data[data.index(block)] ^= 1
    slab.write_bytes(data)
    with slow_store(tiny, stored) as store, engine_over(tiny, store) as engine:
        outputs = knowing(engine).generate([LONG], GREEDY)
        check(outputs, expected[:1])
        assert sources(outputs[0].usage) == (0, 0, 8, 0, 42)
        assert store.stats().misses["checksum"] > 0


@pytest.mark.parametrize("steps", [1, 2])
def test_an_abort_half_way_leaves_nothing_behind(
    tiny: LoadedModel, stored: Path, steps: int
) -> None:
    with slow_store(tiny, stored) as store, engine_over(tiny, store) as engine:
        copies = DelayedCopies(knowing(engine)._loop.hbm, NEVER)
        request = engine.add_request(LONG, GREEDY)
        for _ in range(steps):
            engine.step()
        engine.abort(request)
        engine.check_invariants()
        drain(engine)
        assert not copies.inward
        arrive(store, engine)
        store.flush()
        assert store.stats().ram["pinned_blocks"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_events_gives_the_same_answers(
    tiny: LoadedModel, expected: list[tuple[int, ...]], stored: Path, seed: int
) -> None:
    """HBM and RAM too small; requests that come alone, and others while they load and compute."""
    with (
        slow_store(tiny, stored, ram_bytes=(24 + 4 * (seed % 3)) * 4096) as store,
        engine_over(tiny, store, blocks=30 + 5 * (seed % 4), max_batch=2 + seed) as engine,
    ):
        copies = DelayedCopies(knowing(engine)._loop.hbm, (NEVER, ALWAYS)[seed % 2])
        for number in range(30):
            engine.clear_hbm()
            traffic = Traffic(engine, store, 100 * seed + number, expected)
            traffic.run(12, copies.run_some)
            traffic.check()
        counters = engine.stats().counters
        assert min(counters[name] for name in ("met_blocks", "loaded_blocks")) > 0
        assert "store_errors" not in counters

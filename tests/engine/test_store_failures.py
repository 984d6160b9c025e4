"""A store that is slow, broken, or gone costs hits, and nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import kvstore
from kvstore.engine.engine import Engine
from kvstore.engine.loading import LoadedModel
from kvstore.engine.sampling import SamplingParams
from kvstore.errors import RightsError
from kvstore.hashing import TokenChain
from kvstore.hub import Bounds
from kvstore.store import BlockStore
from kvstore.tier import ReadRequest, ReadResult
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.ram import RamTier
from tests.engine.reference import GREEDY, LONG, PROMPTS, check, drain, engine_over, sources

NVME_BYTES = 16 << 20


class Clock:
    """The machine's, and as much later as the test says."""

    later_s = 0.0

    def wall_s(self) -> float:
        return time.time() + self.later_s

    def monotonic_s(self) -> float:
        return time.monotonic() + self.later_s


class GatedNvme(NvmeTier):
    """An NVMe tier that reads nothing before it is allowed to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, NVME_BYTES)
        self._gate = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_open = False

    async def read(self, items: Sequence[ReadRequest]) -> list[ReadResult]:
        self._loop = asyncio.get_running_loop()
        if not self._is_open:
            await self._gate.wait()
        return await super().read(items)

    def open_gate(self) -> None:
        self._is_open = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._gate.set)


class Brittle(BlockStore):
    """A store of which one verb raises what no store should raise."""

    broken = ""

    def _may(self, verb: str) -> None:
        if self.broken == verb:
            raise OSError(f"{verb} fails")

    def probe(self, *args: Any) -> Any:
        self._may("probe")
        return super().probe(*args)

    def acquire(self, *args: Any, **options: Any) -> Any:
        self._may("acquire")
        return super().acquire(*args, **options)

    def reserve(self, *args: Any, **options: Any) -> Any:
        self._may("reserve")
        return super().reserve(*args, **options)

    def prefetch(self, *args: Any) -> Any:
        self._may("prefetch")
        return super().prefetch(*args)


@pytest.fixture
def filled(tiny: LoadedModel, tmp_path: Path) -> Path:
    """An NVMe directory that holds the blocks of LONG."""
    folder = tmp_path / "nvme"
    store = kvstore.open(ram_bytes="4 MiB", nvme_path=folder, nvme_bytes=NVME_BYTES)
    with store, engine_over(tiny, store) as engine:
        engine.generate([LONG], SamplingParams(max_tokens=1))
    return folder


@pytest.fixture
def gated(filled: Path) -> Iterator[tuple[BlockStore, GatedNvme, Clock]]:
    """A store with the blocks of LONG on a drive that answers only when the gate is opened."""
    tier, clock = GatedNvme(filled), Clock()
    bounds = Bounds(deadline_s=3_600)
    with BlockStore(RamTier(4 << 20), tier, bounds=bounds, clock=clock) as store:
        yield store, tier, clock
        tier.open_gate()


@pytest.mark.parametrize("verb", ["probe", "acquire", "reserve", "prefetch"])
@pytest.mark.parametrize("blocks", [24, 256])
def test_a_verb_that_raises(
    tiny: LoadedModel, expected: list[tuple[int, ...]], verb: str, blocks: int
) -> None:
    store = Brittle(RamTier(4 << 20))
    store.broken = verb
    with store, engine_over(tiny, store, blocks=blocks, max_batch=4) as engine:
        for _ in range(2):
            check(engine.generate(PROMPTS, GREEDY), expected)
            engine.clear_hbm()
        assert engine.stats().counters["store_errors"] > 0


class ReadOnly(BlockStore):
    """As a daemon's, for who has a token that does not let it write."""

    asked, is_denied = 0, True

    def reserve(self, *args: Any, **options: Any) -> Any:
        self.asked += 1
        if self.is_denied:
            raise RightsError("the tenant search has no right to write")
        return super().reserve(*args, **options)


def test_a_store_that_may_only_be_read(
    tiny: LoadedModel, expected: list[tuple[int, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, as what it is, and then not asked for any more."""
    store = ReadOnly(RamTier(4 << 20))
    with store, engine_over(tiny, store, max_batch=4) as engine:
        check(engine.generate(PROMPTS, GREEDY), expected)
        counters = engine.stats().counters
        assert counters["store_denials"] == store.asked == 1
        assert "store_errors" not in counters
    (said,) = [record.getMessage() for record in caplog.records]
    assert "not allow it (offer), going on without: the tenant search has no right" in said


def test_what_a_store_allows_later_is_done(
    tiny: LoadedModel, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.engine.guard.DENIED_S", 0.0)
    store = ReadOnly(RamTier(4 << 20))
    with store, engine_over(tiny, store, max_batch=4) as engine:
        check(engine.generate(PROMPTS, GREEDY), expected)
        store.is_denied = False
        engine.clear_hbm()
        check(engine.generate(PROMPTS, GREEDY), expected)
        counters = engine.stats().counters
        assert counters["store_denials"] > 1
        assert counters["offloaded_blocks"] > 0


def test_a_store_that_is_closed_while_text_is_generated(
    tiny: LoadedModel, expected: list[tuple[int, ...]]
) -> None:
    with BlockStore(RamTier(4 << 20)) as store:
        engine = Engine(tiny, store=store, hbm_bytes="1 MiB", block_tokens=4)
        with engine:
            stream = engine.stream(LONG, GREEDY)
            tokens = [next(stream).token_ids[0] for _ in range(5)]
            store.close()
            tokens += [delta.token_ids[0] for delta in stream]
            assert tuple(tokens) == expected[0]
            assert engine.stats().counters["store_errors"] > 0
            engine.clear_hbm()
            check(engine.generate(PROMPTS, GREEDY), expected)


def test_a_store_that_is_closed_while_it_loads(
    tiny: LoadedModel,
    expected: list[tuple[int, ...]],
    gated: tuple[BlockStore, GatedNvme, Clock],
) -> None:
    store, tier, _ = gated
    engine = Engine(tiny, store=store, hbm_bytes="1 MiB", block_tokens=4)
    with engine:
        engine.add_request(LONG, GREEDY)
        engine.step()
        assert engine.stats().loading == 1
        tier.open_gate()
        store.close()
        assert tuple(delta.token_ids[0] for delta in drain(engine)) == expected[0]


def test_decoding_goes_on_while_another_loads(
    tiny: LoadedModel,
    expected: list[tuple[int, ...]],
    gated: tuple[BlockStore, GatedNvme, Clock],
) -> None:
    store, tier, _ = gated
    with engine_over(tiny, store) as engine:
        loading = engine.add_request(LONG, GREEDY)
        engine.step()
        (output,) = engine.generate([PROMPTS[5]], GREEDY)
        check([output], expected[5:6])
        assert engine.stats().loading == 1
        tier.open_gate()
        deltas = drain(engine)
        assert {delta.request_id for delta in deltas} == {loading}
        assert tuple(delta.token_ids[0] for delta in deltas) == expected[0]
        assert deltas[-1].usage is not None
        assert sources(deltas[-1].usage) == (0, 0, 48, 0, 2)


@pytest.mark.parametrize(("speed_known", "later_s"), [(False, 7_200.0), (True, 60.0)])
def test_a_load_that_misses_its_deadline_is_computed_instead(
    tiny: LoadedModel,
    expected: list[tuple[int, ...]],
    gated: tuple[BlockStore, GatedNvme, Clock],
    speed_known: bool,
    later_s: float,
) -> None:
    store, _, clock = gated
    with engine_over(tiny, store) as engine:
        if speed_known:  # then the deadline is what computing would take, not the store's own
            engine.generate([PROMPTS[5]], GREEDY)
        engine.add_request(LONG, GREEDY)
        assert engine.step() == []
        assert engine.stats().loading == 1
        clock.later_s = later_s
        deltas = drain(engine)
        assert tuple(delta.token_ids[0] for delta in deltas) == expected[0]
        assert deltas[-1].usage is not None
        assert sources(deltas[-1].usage) == (0, 0, 0, 0, 50)
        assert store.stats().misses["deadline"] == 12


@pytest.mark.parametrize("how", ["abort", "close"])
def test_a_load_that_is_given_up_leaves_no_pins(
    tiny: LoadedModel, gated: tuple[BlockStore, GatedNvme, Clock], how: str
) -> None:
    store, tier, _ = gated
    with engine_over(tiny, store) as engine:
        request = engine.add_request(LONG, GREEDY)
        engine.step()
        assert engine.stats().loading == 1
        if how == "abort":
            engine.abort(request)
            assert not engine.busy
            assert engine.stats().hbm_used_blocks == 0
        else:
            engine.close()
    tier.open_gate()
    with store.acquire(TokenChain(engine.namespace, LONG).chain()) as lease:
        lease.wait()
    assert store.stats().ram["pinned_blocks"] == 0


def test_a_load_is_preempted_for_an_older_sequence(
    tiny: LoadedModel,
    expected: list[tuple[int, ...]],
    gated: tuple[BlockStore, GatedNvme, Clock],
) -> None:
    store, tier, _ = gated
    with engine_over(tiny, store, blocks=33) as engine:
        old = engine.stream(PROMPTS[5], GREEDY)  # 18 blocks, and six to come
        tokens = next(old).token_ids
        engine.add_request(LONG, GREEDY)  # 13 blocks
        while engine.stats().preemptions == 0:
            tokens += next(old).token_ids
        tier.open_gate()
        deltas = drain(engine)
        tokens += tuple(token for delta in old for token in delta.token_ids)
        assert tokens == expected[5]
        assert tuple(delta.token_ids[0] for delta in deltas) == expected[0]


def test_flipped_bits_on_the_drive_are_computed_again(
    tiny: LoadedModel, expected: list[tuple[int, ...]], filled: Path
) -> None:
    slab = filled / "slab"
    data = bytearray(slab.read_bytes())
    for place in range(100, len(data), 4096):
        data[place] ^= 1
    slab.write_bytes(data)
    store = kvstore.open(ram_bytes="4 MiB", nvme_path=filled, nvme_bytes=NVME_BYTES)
    with store, engine_over(tiny, store) as engine:
        outputs = engine.generate([LONG], GREEDY)
        check(outputs, expected[:1])
        assert sources(outputs[0].usage) == (0, 0, 0, 0, 50)
        assert store.stats().misses["checksum"] > 0


def test_a_truncated_file_is_computed_again(
    tiny: LoadedModel, expected: list[tuple[int, ...]], filled: Path
) -> None:
    slab = filled / "slab"
    with slab.open("r+b") as file:
        file.truncate(4096 * 5)
    store = kvstore.open(ram_bytes="4 MiB", nvme_path=filled, nvme_bytes=NVME_BYTES)
    with store, engine_over(tiny, store) as engine:
        check(engine.generate([LONG], GREEDY), expected[:1])

"""The engine on a CUDA device: its own streams, held up on purpose, and graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.engine.engine import Engine
from kvstore.engine.loading import LoadedModel, load
from kvstore.engine.sampling import SamplingParams
from kvstore.kernels.block_copy_cuda import KernelCopies
from kvstore.kernels.paged_tensors import paged
from kvstore.kernels.pinned_memory import PINNED
from kvstore.store import BlockStore
from kvstore.tiers.hbm import HbmTier
from kvstore.tiers.hbm_copies import CopyEvent, Gates
from kvstore.tiers.hbm_cuda import CudaCopies, CudaStream
from kvstore.tiers.ram import RamTier
from tests.engine.reference import BLOCK_TOKENS, GREEDY, PROMPTS, check, engine_over
from tests.engine.tiny import tiny_model
from tests.engine.traffic import Traffic

pytestmark = pytest.mark.gpu

SLEEP_CYCLES = 3_000_000  # a millisecond or two: several steps of a tiny model
SLOT_BYTES = 4096


class HeldUp(CudaStream):
    """Does nothing for a while before every copy."""

    def run(self, copy: Callable[[], None]) -> CopyEvent:
        def late() -> None:
            torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
            copy()

        return super().run(late)


class Checked(CudaCopies):
    """Spoils what a copy in will write, and compares what a copy out has read."""

    def __init__(self, hbm: HbmTier) -> None:
        pages = paged(hbm.kv, hbm.layout.block_tokens)
        kernel = KernelCopies(pages, hbm.layout.block_tokens)
        device = hbm.kv.device
        super().__init__(pages, hbm.layout, kernel, kernel, PINNED, HeldUp(device), HeldUp(device))
        self._hbm = hbm
        hbm.copies = self

    def _content(self, block: int) -> torch.Tensor:
        tokens = self._hbm.layout.block_tokens
        return self._hbm.kv[:, :, :, block * tokens : (block + 1) * tokens]

    def copy_out(self, blocks: Sequence[int], views: Sequence[memoryview]) -> CopyEvent:
        before = [self._content(block).clone() for block in blocks]
        return _Compared(super().copy_out(blocks, views), before, list(views))

    def copy_in(self, blocks: Sequence[int], views: Sequence[memoryview]) -> CopyEvent:
        self._spoil(blocks)
        return super().copy_in(blocks, views)

    def copy_in_by_layer(self, blocks: Sequence[int], views: Sequence[memoryview]) -> Gates:
        self._spoil(blocks)
        return super().copy_in_by_layer(blocks, views)

    def _spoil(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._content(block).fill_(torch.nan)


class _Compared:
    def __init__(
        self, event: CopyEvent, before: list[torch.Tensor], views: list[memoryview]
    ) -> None:
        self._event, self._before, self._views = event, before, views

    def done(self) -> bool:
        if not self._event.done():
            return False
        for view, before in zip(self._views, self._before, strict=True):
            raw = before.contiguous().view(torch.uint8).cpu().numpy().tobytes()
            assert bytes(view) == raw, "a block was reused before it was copied"
        self._before, self._views = [], []
        return True

    def wait(self) -> None:
        self._event.wait()

    def precede_compute(self) -> None:
        self._event.precede_compute()


@pytest.fixture(scope="module")
def there(tiny_path: Path) -> LoadedModel:
    """The tiny model in float32, whose close calls are too far apart to be decided by a bit."""
    return load(tiny_path, torch.float32, "cuda")


@pytest.fixture(scope="module")
def answers(there: LoadedModel) -> list[tuple[int, ...]]:
    with engine_over(there, None) as engine:
        return [output.token_ids for output in engine.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("seed", range(6))
def test_streams_that_are_held_up_change_no_answer(
    there: LoadedModel, answers: list[tuple[int, ...]], seed: int
) -> None:
    """HBM far too small for the requests, RAM far too small for their blocks."""
    with (
        BlockStore(RamTier((40 + 30 * (seed % 3)) * SLOT_BYTES)) as store,
        engine_over(there, store, blocks=24 + 5 * (seed % 4), max_batch=2 + seed) as engine,
    ):
        Checked(engine._loop.hbm)
        traffic = Traffic(engine, store, seed, answers)
        traffic.run(400, lambda chance: None)
        traffic.check()
        counters = engine.stats().counters
        assert counters["offloaded_blocks"] > 20
        assert counters["loaded_blocks"] > 20
        assert "store_errors" not in counters


def test_every_tier_gives_the_same_answers(
    there: LoadedModel, answers: list[tuple[int, ...]]
) -> None:
    with BlockStore(RamTier(4 << 20)) as store, engine_over(there, store) as engine:
        for _ in range(3):
            check(engine.generate(PROMPTS, GREEDY), answers)
            engine.clear_hbm()
        assert engine.stats().counters["loaded_blocks"] > 0


def test_graphs_give_what_launches_give(tmp_path: Path) -> None:
    """Heads that the kernels know, in bfloat16; the sizes of steps are captured by the engine."""
    path = tiny_model(tmp_path / "wide", head_dim=64)
    sampled = SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9, seed=3, ignore_eos=True)
    with Engine.from_pretrained(path, device="cuda", hbm_bytes="8 MiB", max_batch=4) as engine:
        forward = engine._loop._forward
        assert forward._steps is not None
        for params in (GREEDY, sampled):
            captured = [output.token_ids for output in engine.generate(PROMPTS, params)]
            engine.clear_hbm()  # prompts computed in other pieces would be rounded otherwise
            forward._steps, steps = None, forward._steps
            launched = [output.token_ids for output in engine.generate(PROMPTS, params)]
            forward._steps = steps
            engine.clear_hbm()
            assert captured == launched


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
def test_graphs_on_a_second_device(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "wide", head_dim=64)
    given = []
    for device in ("cuda:0", "cuda:1"):
        with Engine.from_pretrained(path, device=device, hbm_bytes="8 MiB", max_batch=4) as engine:
            assert engine._loop._forward._steps is not None
            given.append([output.token_ids for output in engine.generate(PROMPTS, GREEDY)])
    assert given[0] == given[1]


@pytest.mark.parametrize("head_dim", [16, 64])  # unknown to the kernels, and known
def test_hbm_is_what_is_left_of_the_fraction(tmp_path: Path, head_dim: int) -> None:
    path = tiny_model(tmp_path / "model", head_dim=head_dim)
    _, total_bytes = torch.cuda.mem_get_info()
    options: dict[str, Any] = {"device": "cuda", "hbm_fraction": 0.3, "block_tokens": 256}
    with Engine.from_pretrained(path, **options) as engine:
        layout = engine.namespace.layout
        kept_bytes = engine.stats().hbm_blocks * layout.block_bytes
        free_bytes, _ = torch.cuda.mem_get_info()
        assert kept_bytes > 0.1 * total_bytes
        assert total_bytes - free_bytes < 0.35 * total_bytes
        (output,) = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=4, ignore_eos=True))
        assert len(output.token_ids) == 4


def test_two_engines_share_one_pinned_arena(
    there: LoadedModel, answers: list[tuple[int, ...]]
) -> None:
    with BlockStore(RamTier(4 << 20)) as store:
        for _ in range(2):
            with engine_over(there, store, block_tokens=BLOCK_TOKENS) as engine:
                check(engine.generate(PROMPTS, GREEDY), answers)
                assert "store_errors" not in engine.stats().counters

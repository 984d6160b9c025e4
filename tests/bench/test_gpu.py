"""Every benchmark of the GPU runs from end to end, on sizes and a device that say nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.bench.benchmark import Bench, measured
from kvstore.bench.copies import WAYS
from kvstore.bench.gpu import catalogue, facts, select
from kvstore.bench.rows import NotHereError, Row, Unmeasured
from kvstore.bench.sizes import FULL, TINY
from kvstore.errors import InputError
from kvstore.kernels.block_copies import BlockCopies
from kvstore.kernels.cuda_module import Runtime
from kvstore.kernels.paged_tensors import PagedTensors
from kvstore.layout import BlockLayout
from tests.bench.cpu_card import CpuCard

COPIES = [
    "pages to RAM by kernel, {} blocks",
    "pages from RAM by kernel, {} blocks",
    "pages to RAM by DMA, {} blocks",
    "pages from RAM by DMA, {} blocks",
    "pages both ways at once by *, {} blocks",
]
SHAPES = ["batch 3, context 48", "batch 1, context 144"]
NAMES = {
    "copies/16": [each.format("16-token") for each in COPIES],
    "copies/32": [each.format("32-token") for each in COPIES],
    "attention/bf16": [
        f"decode attention, bf16, {shape}{beside}"
        for shape in SHAPES
        for beside in ("", ", beside torch")
    ],
    "attention/fp8": [f"decode attention, fp8, {shape}" for shape in SHAPES],
    "attention/write": [f"write of K and V, {count} tokens, one layer" for count in (2, 8)],
    "decode/graphs": [f"decode steps with CUDA graphs, batch {batch}" for batch in (1, 3)],
    "decode/beside": [
        f"decode steps beside pages {way}" for way in ("to RAM", "from RAM", "both ways")
    ],
    "decode/offload": ["decode with offload, batch 3"],
    "prompts/ram": [
        f"TTFT of 512 tokens, {how}"
        for how in (
            "computed without a store",
            "from RAM",
            "leading half from RAM and then the rest computed",
        )
    ],
    "prompts/nvme": [
        "TTFT of 512 tokens, from NVMe",
        "TTFT of 512 tokens, loaded from NVMe and computed at once",
    ],
}


def run(bench: Bench, name: str) -> tuple[list[Row], list[Unmeasured]]:
    began: list[str] = []
    everything = list(measured(select(catalogue(TINY), [name]), bench, began.append))
    assert began == [name]
    rows = [each for each in everything if isinstance(each, Row)]
    return rows, [each for each in everything if isinstance(each, Unmeasured)]


@pytest.mark.parametrize("name", NAMES)
def test_its_rows(bench: Bench, name: str, request: pytest.FixtureRequest) -> None:
    if name == "prompts/nvme":
        request.getfixturevalue("o_direct")
    rows, unmeasured = run(bench, name)
    assert [each for each in unmeasured if each.outcome == "failed"] == []
    got = [row.name.replace(" by kernel, ", " by *, ") for row in rows]
    assert [each.replace("at once by DMA", "at once by *") for each in got] == [
        each.replace(" by kernel, ", " by *, ") for each in NAMES[name]
    ]
    for row in rows:
        assert row.value > 0, row.name
        assert row.ceiling is None or row.ceiling > 0, row.name
        assert row.ceiling is None or row.against, "a ceiling must say what it is"
        assert row.ceiling is not None or (row.at_least, row.at_most) == (None, None)


def test_fp8_has_no_peer_in_torch(bench: Bench) -> None:
    _, unmeasured = run(bench, "attention/fp8")
    assert [each.name for each in unmeasured] == [
        f"decode attention, fp8, {shape}, beside torch" for shape in SHAPES
    ]
    assert all("no fp8" in each.reason for each in unmeasured)


class OneWay(CpuCard):
    """On which the HBM tier takes this way."""

    def __init__(self, runtime: Runtime | None, way: str) -> None:
        super().__init__(runtime)
        self._way = way

    def tier_copies(self, pages: PagedTensors, layout: BlockLayout) -> BlockCopies:
        return WAYS[self._way](pages, layout.block_tokens, runtime=self.runtime)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["copies/32", "decode/beside"])
def test_of_the_two_ways_of_copying_the_tiers_is_judged(
    card: CpuCard, tmp_path: Path, way: str, name: str
) -> None:
    """Whichever of them was quicker here."""
    rows, unmeasured = run(Bench(OneWay(card.runtime, way), TINY, tmp_path), name)
    assert unmeasured == []
    judged = [row for row in rows if row.at_least is not None]
    assert len(judged) == 3
    assert all(f"by {way}" in row.name + row.against for row in judged)


def test_sessions(bench: Bench) -> None:
    rows, unmeasured = run(bench, "sessions")
    assert unmeasured == []
    assert sum(row.unit == "sessions" for row in rows) == len(TINY.answers)
    # How evenly tokens come on a CPU that has other things to do is not to be foretold.
    for sessions, turns, gap in zip(*[iter(rows)] * 3, strict=True):
        assert [row.unit for row in (sessions, turns, gap)] == ["sessions", "turns/s", "ms"]
        if sessions.value:
            assert sessions.value == pytest.approx(turns.value * TINY.think_s)


def test_every_benchmark_is_tested_here() -> None:
    assert {benchmark.name for benchmark in catalogue(TINY)} == {*NAMES, "sessions"}


class Unpinned(CpuCard):
    """Which reaches no memory but what it was asked for."""

    def pin(self, memory: memoryview) -> bool:
        assert memory.nbytes
        return False


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("decode/offload", "decode with offload"),
        ("prompts/ram", "prompts from RAM"),
        ("prompts/nvme", "prompts from NVMe"),
        ("sessions", "sessions"),
    ],
)
def test_memory_that_is_not_pinned_is_said_beside_the_figures(
    card: CpuCard, tmp_path: Path, name: str, says: str, request: pytest.FixtureRequest
) -> None:
    if name == "prompts/nvme":
        request.getfixturevalue("o_direct")
    rows, (said, *others) = run(Bench(Unpinned(card.runtime), TINY, tmp_path), name)
    assert (said.name, said.outcome) == (f"{says} with pinned memory", "skipped")
    assert "by way of other memory" in said.reason
    assert others == []
    assert rows


@pytest.mark.usefixtures("o_direct")
def test_nothing_stays_on_the_drive(bench: Bench, tmp_path: Path) -> None:
    run(bench, "prompts/nvme")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"nvme"}, "that folder goes with the directory"


def test_choice_is_by_name_by_group_or_all() -> None:
    benchmarks = catalogue(FULL)
    assert [each.name for each in select(benchmarks, ["decode"])] == [
        "decode/graphs",
        "decode/beside",
        "decode/offload",
    ]
    assert [each.name for each in select(benchmarks, ["sessions", "copies/64"])] == [
        "copies/64",
        "sessions",
    ]
    assert select(benchmarks, []) == benchmarks
    with pytest.raises(InputError, match="no benchmark is called 'copies/17'"):
        select(benchmarks, ["copies/17"])


def test_the_bounds_of_a_full_run_are_those_of_16_token_blocks() -> None:
    assert FULL.block_tokens == FULL.copy_block_tokens[0] == 16
    assert [shape.label for shape in FULL.decode_shapes] == [
        "batch 64, context 4 Ki",
        "batch 8, context 32 Ki",
    ]


def test_facts_name_device_model_and_versions(bench: Bench) -> None:
    said = facts(bench)
    assert said["device"] == {"name": "no GPU"}
    assert said["model"] == "tiny"
    assert "torch" in said["versions"]


class Noted(Bench):
    """Of which every benchmark is told that there is no room, after it has said how much."""

    def __init__(self, card: CpuCard) -> None:
        super().__init__(card, FULL, Path())
        self.needs: list[dict[str, int]] = []

    def need(self, **needs: int) -> None:
        self.needs.append(needs)
        raise NotHereError("no room")


def test_a_full_run_fits_an_h100(card: CpuCard) -> None:
    """80 GB of HBM, and as the command's help has it: 64 GB of RAM, 12 GiB of the drive."""
    bench = Noted(card)
    began: list[str] = []
    chosen = catalogue(FULL)
    assert len(list(measured(chosen, bench, began.append))) == len(chosen) == len(bench.needs)
    for name, needs in zip(began, bench.needs, strict=True):
        assert 0 < needs["hbm_bytes"] < 72 << 30, name
        assert needs.get("ram_bytes", 0) < 60 << 30, name
        assert needs.get("disk_bytes", 0) < 12 << 30, name

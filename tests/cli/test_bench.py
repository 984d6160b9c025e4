"""`kvstore bench gpu`: refused without a GPU, and what it prints with one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.bench import card as cards
from kvstore.bench import gpu
from kvstore.bench.benchmark import Bench, Benchmark
from kvstore.bench.rows import Row, Unmeasured
from kvstore.bench.sizes import FULL
from tests.bench.cpu_card import CpuCard
from tests.cli.commands import Done
from tests.kernels.emulator import EmulatedRuntime

without_a_gpu = pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="a GPU")


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    folder = tmp_path / "drive"
    folder.mkdir()
    return folder


@pytest.fixture
def a_card(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    """The CPU in place of the GPU that is asked for."""
    if shutil.which("g++") is None:
        pytest.skip("kernels are emulated with g++, which is not there")
    assert pytestconfig.cache is not None
    card = CpuCard(EmulatedRuntime(Path(pytestconfig.cache.mkdir("emulator"))))
    monkeypatch.setattr(cards, "cuda_card", lambda name: card)


@without_a_gpu
def test_without_a_gpu_it_says_so(here: Callable[..., Done], drive: Path) -> None:
    done = here("bench", "gpu", "--dir", drive)
    assert done.status == 2
    assert done.stdout == ""
    assert done.stderr.startswith("kvstore: device cuda: ")
    assert done.stderr.count("\n") == 1
    assert list(drive.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--device", "cpu"], "device cpu: this measures GPUs"),
        (["--device", "tpu"], "device 'tpu' is not one of"),
        (["sesions"], "no benchmark is called 'sesions'; these are: copies, attention"),
        (["--dir", "/nowhere"], "/nowhere"),
    ],
)
def test_what_makes_no_sense(here: Callable[..., Done], args: list[str], says: str) -> None:
    done = here("bench", "gpu", *args)
    assert done.status == 2
    assert says in done.stderr
    assert done.stdout == ""


@pytest.mark.usefixtures("a_card")
def test_json_and_a_table_for_who_watches(here: Callable[..., Done], drive: Path) -> None:
    done = here(
        *("bench", "gpu", "attention/write", "attention/fp8", "--quick", "--json"),
        *("--dir", drive),
    )
    report = done.data
    assert (report["effort"], report["model"], report["device"]["name"]) == (
        "quick",
        "tiny",
        "no GPU",
    )
    assert [row["unit"] for row in report["rows"]] == ["GB/s", "GB/s", "us", "us"]
    assert [each["outcome"] for each in report["unmeasured"]] == ["skipped", "skipped"]
    # Nobody reaches 0.85 of a memcpy with an emulated kernel, and it is not judged by that.
    assert (done.status, report["ok"], report["judged"]) == (0, True, 0)
    assert "write of K and V, 8 tokens, one layer" in done.stderr
    assert "nothing was judged" in done.stderr
    assert "not measured decode attention, fp8, batch 3, context 48, beside torch: " in done.stderr
    assert list(drive.iterdir()) == []


@pytest.mark.usefixtures("a_card")
def test_the_table_alone(here: Callable[..., Done], drive: Path) -> None:
    done = here("bench", "gpu", "attention/write", "--quick", "--dir", drive)
    assert done.status == 0
    assert "nothing was judged" in done.stdout
    assert "write of K and V, 8 tokens, one layer" in done.stdout
    assert "one layer: scattered slots, rotary embedding of K included" in done.stdout
    assert done.stderr.startswith("name no GPU\n1. attention/write\n   write of K and V, 2 tokens")


@pytest.fixture
def three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One benchmark keeps a bound and misses one; the next measures nothing."""

    def first(bench: Bench) -> Iterator[Row | Unmeasured]:
        yield Row("kept", "g", 9.0, "GB/s", 10.0, "memcpy", at_least=0.9)
        yield Row("missed", "g", 8.0, "GB/s", 10.0, "memcpy", at_least=0.9, note="a note")

    def second(bench: Bench) -> Iterator[Row | Unmeasured]:
        yield Unmeasured("second", "skipped", "no drive")

    made = [Benchmark("first", first), Benchmark("second", second)]
    monkeypatch.setattr(gpu, "catalogue", lambda sizes: made)


@pytest.mark.usefixtures("a_card", "three_rows")
def test_each_result_is_told_as_it_comes(here: Callable[..., Done], drive: Path) -> None:
    """Who is killed before the table has shown what was measured."""
    done = here("bench", "gpu", "--json", "--dir", drive)
    assert done.stderr.startswith(
        "name no GPU\n"
        "1. first\n"
        "   kept: 9 GB/s; 0.900 of 10, memcpy; ≥ 0.9: ok\n"
        "   missed: 8 GB/s; 0.800 of 10, memcpy; ≥ 0.9: misses; a note\n"
        "2. second\n"
        "   not measured second: no drive\n"
    )
    assert (done.status, done.data["ok"], done.data["judged"]) == (1, False, 2)


@pytest.mark.usefixtures("a_card", "three_rows")
def test_quick_judges_nothing_by_bounds(here: Callable[..., Done], drive: Path) -> None:
    done = here("bench", "gpu", "--quick", "--json", "--dir", drive)
    assert (done.status, done.data["ok"], done.data["judged"]) == (0, True, 0)


@pytest.mark.usefixtures("a_card")
def test_quick_fails_where_something_broke(
    here: Callable[..., Done], drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(bench: Bench) -> Iterator[Row | Unmeasured]:
        yield Row("a", "g", 1.0, "GB/s")
        raise RuntimeError("a bug")

    monkeypatch.setattr(gpu, "catalogue", lambda sizes: [Benchmark("broken", broken)])
    done = here("bench", "gpu", "--quick", "--json", "--dir", drive)
    assert (done.status, done.data["ok"]) == (1, False)
    assert "   failed broken: RuntimeError: a bug\n" in done.stderr


def test_help_says_what_it_takes(here: Callable[..., Done]) -> None:
    text = " ".join(here("bench", "gpu", "--help").stdout.split())
    for word in ("copies", "attention", "decode", "prompts", "sessions", "8 minutes", "--quick"):
        assert word in text
    assert FULL.time_limit_s < 8 * 60

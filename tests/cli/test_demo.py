"""`kvstore demo`, with a tiny model: every place, a real new process, sums and tokens checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvstore.cli import demo_runs
from kvstore.cli.demo import print_report, summarise
from kvstore.cli.demo_runs import COLD, HBM, NVME, PLACES, QUESTIONS, RAM, Run
from tests.cli.commands import Done


def test_every_place_gives_the_same_tokens(here: Callable[..., Done], model: Path) -> None:
    done = here("demo", "--model", model, "--json")
    assert done.status == 0
    # Nobody sees a bar in a log: each wait, some of minutes, says what it is for.
    told = done.stderr.splitlines()
    for place in PLACES.values():
        assert any(place in line for line in told)
    report = done.data
    assert report["ok"] is True
    runs = {(run["place"], run["question"]): run for run in report["runs"]}
    assert runs.keys() == {(place, question) for place in PLACES for question in QUESTIONS}
    for (place, question), run in runs.items():
        parts = {name: run[name] for name in ("hbm", "ram", "nvme", "recomputed")}
        assert sum(parts.values()) == run["prompt_tokens"]
        assert run["token_ids"] == runs[COLD, question]["token_ids"]
        assert run["ttft_s"] > 0
        # What the place is about is where most of the prompt came from.
        main = "recomputed" if place == COLD else place
        assert max(parts, key=lambda name: parts[name]) == main
        if place == COLD:
            assert parts["recomputed"] == run["prompt_tokens"]


def test_the_table_fits_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_report(summarise([run(place, [1, 2]) for place in PLACES]))
    shown = capsys.readouterr().out
    for text in (*PLACES.values(), "TTFT", "recomputed", "identical", "token for token"):
        assert text in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_an_answer_that_was_cut_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    whole = [run(place, [1, 2]) for place in PLACES]
    print_report(summarise(whole))
    assert "Because.\n" in capsys.readouterr().out
    print_report(summarise([replace(each, finish_reason="length") for each in whole]))
    assert "Because. ...\n" in capsys.readouterr().out


def run(place: str, token_ids: list[int], recomputed: int = 10) -> Run:
    return Run("Why?", place, "Because.", "stop", token_ids, 0.5, 100, 0, 90, 0, recomputed)


def test_what_is_not_ok() -> None:
    same = [run(place, [1, 2]) for place in (COLD, HBM, RAM, NVME)]
    assert summarise(same)["ok"]
    assert not summarise([*same[:3], run(NVME, [1, 3])])["ok"]
    assert not summarise([*same[:3], run(NVME, [1, 2], recomputed=9)])["ok"]
    assert summarise([replace(each, ttft_s=9.0) for each in same])["median_ttft_s"][RAM] == 9.0


def test_a_model_that_is_not_there(here: Callable[..., Done]) -> None:
    done = here("demo", "--model", "nowhere")
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr == "kvstore: there is no model at nowhere\n"


def test_the_document_is_long_enough_and_says_what_is_asked() -> None:
    text = demo_runs.document()
    assert 5_000 < len(text) < 10_000
    for fact in ("first promise is: never wrong", "A lease\nis a set of blocks", "is 1 GiB"):
        assert fact in text

"""`kvstore explain`, and commands that name blocks by a prompt: the very blocks of `generate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import kvstore
from tests.cli.commands import Done
from tests.cli.test_bad_input import refused
from tests.daemon.data_doors import DataDaemon
from tests.daemon.doors import DaemonProcess
from tests.daemon.tenants import OPERATOR, READER, TENANTS, VICTIM

TEXT = "the quick brown fox jumps over the lazy dog, and then it does so again."  # a token a byte


@pytest.fixture
def blocks(here: Callable[..., Done], model: Path, tmp_path: Path) -> Path:
    """What `generate` has left of one prompt."""
    path = tmp_path / "nvme"
    nvme = ("--nvme-path", path, "--nvme-bytes", "64 MiB")
    done = here("generate", TEXT, "--model", model, *nvme, "--max-tokens", "1", "--json")
    assert done.status == 0
    return path


def test_a_prompt_that_is_held(here: Callable[..., Done], blocks: Path, model: Path) -> None:
    asked = ("explain", TEXT, blocks, "--model", model)
    data = here(*asked, "--json").data
    assert (data["tokens"], data["blocks"], data["breaks_at"]) == (len(TEXT), len(TEXT) // 16, None)
    assert data["stretches"] == [{"tier": "nvme", "start": 0, "stop": len(TEXT) // 16}]
    plain = here(*asked).stdout
    assert "blocks 0 to 3: on NVMe\nAll of it is held.\n" in plain
    assert f"{len(TEXT) % 16} tokens more, in no full block" in plain


@pytest.mark.parametrize("token", [VICTIM, READER, OPERATOR])
def test_a_tenants_namespace_has_a_name_that_is_not_known_here(
    here: Callable[..., Done], model: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("KVSTORE_CLIENT__TOKEN", token)
    with kvstore.open(ram_bytes="1 MiB") as store, DataDaemon(store, TENANTS) as daemon:
        asked = ("explain", TEXT, "--store", daemon.url, "--model", model)
        assert here(*asked, "--json").data["namespace"] is None
        assert "namespace of this tenant alone\n" in here(*asked).stdout


def test_where_a_prompt_goes_another_way(
    here: Callable[..., Done], blocks: Path, model: Path
) -> None:
    other = TEXT[:40] + "X" + TEXT[41:]
    data = here("explain", other, blocks, "--model", model, "--json").data
    assert (data["breaks_at"], data["reason"], data["present"]) == (2, "absent", 2)
    assert data["breaks_at_text"] == other[32:48]
    assert data["stretches"] == [
        {"tier": "nvme", "start": 0, "stop": 2},
        {"tier": None, "start": 2, "stop": 4},
    ]
    plain = here("explain", other, blocks, "--model", model).stdout
    assert f'breaks at block 2, token 32 ("{other[32:48]}"): absent: ' in plain


def test_other_settings_are_another_namespace(
    here: Callable[..., Done], blocks: Path, model: Path
) -> None:
    asked = ("explain", TEXT, blocks, "--model", model)
    for flags, name, ours, theirs in (
        (("--dtype", "float32"), "kv_dtype", "float32", "bfloat16"),
        (("--block-tokens", "8"), "block_tokens", 8, 16),
    ):
        data = here(*asked, *flags, "--json").data
        assert (data["breaks_at"], data["reason"]) == (0, "identity")
        assert data["namespace_known"] is False
        assert data["differences"] == {name: [ours, theirs]}
        assert f"  {name} is {ours!r}, stored is {theirs!r}\n" in here(*asked, *flags).stdout
    salted = here(*asked, "--set", "tenant.salt=hush", "--json")
    assert list(salted.data["differences"]) == ["salt"]
    assert "hush" not in salted.stdout


def test_quantised_kv_has_a_name_of_its_own(
    here: Callable[..., Done], model: Path, tmp_path: Path
) -> None:
    directory, int8 = tmp_path / "int8", ("--kv-dtype", "int8")
    answer = ("--model", model, "--max-tokens", "1", "--json")
    args = (*answer, "--nvme-path", directory, "--nvme-bytes", "16MiB")
    first, again = (here("generate", TEXT, *args, *int8).data for _ in range(2))
    assert again["usage"]["nvme_tokens"] == 64
    assert again["completions"] == first["completions"]
    asked = ("explain", TEXT, directory, "--model", model, "--json")
    assert here(*asked, *int8).data["breaks_at"] is None
    plain = here(*asked).data
    assert (plain["breaks_at"], plain["reason"]) == (0, "identity")
    assert list(plain["differences"]) == ["kv_dtype", "kv_quantisation"]
    refused(here("generate", TEXT, *args, "--kv-dtype", "fp4"), "--kv-dtype", "auto, fp8")


def test_a_prompt_may_come_from_elsewhere(
    here: Callable[..., Done], blocks: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text(TEXT)
    asked = ("--model", model, "--json")
    data = here("explain", "", blocks, "--file", tmp_path / "text", *asked).data
    assert data["breaks_at"] is None
    both = here("explain", "Why, and when?", blocks, "--file", tmp_path / "text", *asked).data
    assert (both["breaks_at"], both["present"]) == (4, 4)
    assert here("explain", TEXT, blocks, "--chat", *asked).data["tokens"] > len(TEXT)


def test_evict_retain_and_export_a_prompt(
    here: Callable[..., Done], blocks: Path, model: Path, tmp_path: Path
) -> None:
    """Online: generate through a daemon, and every command finds the same blocks."""
    args = ("--ram-bytes", "8 MiB", "--nvme-bytes", "64 MiB", "--nvme-path", str(blocks))
    asked = ("--prompt", TEXT, "--model", model)
    with DaemonProcess(tmp_path, *args) as process:
        store = ("--store", process.url)
        generated = here("generate", TEXT, "--model", model, *store, "--max-tokens", "1", "--json")
        assert generated.data["usage"]["nvme_tokens"] == 64
        found = here("explain", TEXT, "--model", model, *store, "--json").data
        assert found["stretches"] == [{"tier": "ram", "start": 0, "stop": 4}]
        assert here("retain", *asked, *store, "--priority", "60", "--json").data["accepted"] == 4
        listed = here("ls", "--blocks", *store, "--json").data["blocks"]
        assert [block["priority"] for block in listed] == [60] * 4
        assert here("export", "it.kv", *asked, *store, "--json").data["blocks"] == 4
        assert here("evict", *asked, *store).stdout == "4 blocks dropped\n"
        gone = here("explain", TEXT, "--model", model, *store, "--json").data
        assert (gone["present"], gone["reason"]) == (0, "evicted")
        assert here("import", "it.kv", *store).status == 0
        again = here("generate", TEXT, "--model", model, *store, "--max-tokens", "1", "--json")
        assert again.data["usage"]["ram_tokens"] == 64
        assert again.data["completions"] == generated.data["completions"]


def test_bad_input(here: Callable[..., Done], blocks: Path, model: Path) -> None:
    refused(here("explain", TEXT, blocks), "which model? give --model")
    refused(here("explain", TEXT, blocks, "--model", "nowhere"), "there is no model at nowhere")
    refused(here("explain", "", blocks, "--model", model), "there is no prompt")
    refused(here("explain", TEXT, "--model", model), "which store?")
    refused(here("explain", TEXT, blocks, "--model", model, "--file", "no"), "no: cannot be read")
    short = here("evict", blocks, "--prompt", "hi", "--model", model)
    refused(short, "the prompt is shorter than a block of 16 tokens")
    assert here("explain", "hi", blocks, "--model", model).stdout.endswith(
        "Nothing of it can be held.\n"
    )
    assert here("explain").status == 2

"""`kvstore ls`, `stat`, `verify` on real directories, sound and damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import kvstore
from kvstore.tiers.nvme_verify import read_directory
from tests.cli.commands import Done, fill, namespace
from tests.daemon.doors import DaemonProcess

BLOCK_BYTES = 8192


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    """Five blocks of one model, three of another."""
    path = tmp_path / "blocks"
    with kvstore.open(ram_bytes="4 MiB", nvme_path=path, nvme_bytes="8 MiB") as store:
        fill(store, 5)
        fill(store, 3, model="another model")
    return path


def test_ls_lists_every_block(here: Callable[..., Done], blocks: Path) -> None:
    listed = here("ls", "--blocks", blocks, "--json").data["blocks"]
    ours = kvstore.TokenChain(namespace(), range(80)).chain()
    theirs = kvstore.TokenChain(namespace("another model"), range(48)).chain()
    by_key = {bytes.fromhex(block["key"]): block for block in listed}
    assert by_key.keys() == {*ours.keys, *theirs.keys}
    for chain in (ours, theirs):
        for key, parent in zip(chain.keys, (chain.parent, *chain.keys), strict=False):
            assert bytes.fromhex(by_key[key]["parent"]) == parent
            assert by_key[key]["model"] == chain.namespace.model
            assert by_key[key]["stored_bytes"] == BLOCK_BYTES
    last_uses = [block["last_use_s"] for block in listed]
    assert last_uses == sorted(last_uses, reverse=True)

    plain = here("ls", "--blocks", blocks)
    assert plain.status == 0
    assert [line.split()[0] for line in plain.stdout.splitlines()[1:]] == [
        block["key"] for block in listed
    ]


def test_ls_lists_namespaces_and_chains(here: Callable[..., Done], blocks: Path) -> None:
    listed = here("ls", blocks, "--json").data
    assert listed["store"] == str(blocks)
    ours, theirs = listed["namespaces"]
    assert (ours["model"], ours["blocks"], ours["tokens"]) == ("a model", 5, 80)
    assert ours["tiers"] == {"nvme": {"blocks": 5, "stored_bytes": 5 * BLOCK_BYTES}}
    assert ours["namespace"]["layers"] == namespace().layers
    assert (theirs["model"], theirs["raw_bytes"]) == ("another model", 3 * BLOCK_BYTES)
    assert "       80     40 KiB" in here("ls", blocks).stdout

    chains = here("ls", "--chains", blocks, "--json").data["chains"]
    first = kvstore.TokenChain(namespace(), range(16)).chain().keys[0].hex()
    chain = next(each for each in chains if each["model"] == "a model")
    assert (chain["head"], chain["blocks"], chain["length"]) == (first, 5, 5)
    assert chain["starts_a_prompt"] is True
    assert len(here("ls", "--chains", blocks).stdout.splitlines()) == 3

    name = ours["fingerprint"]
    for args in (["--namespace", name], ["--namespace", name[:4].upper()]):
        (only,) = here("ls", *args, blocks, "--json").data["namespaces"]
        assert only["fingerprint"] == name
        blocks_of_it = here("ls", "--blocks", *args, blocks, "--json").data["blocks"]
        assert {block["namespace"] for block in blocks_of_it} == {name}


def test_stat_sums_up(here: Callable[..., Done], blocks: Path) -> None:
    data = here("stat", blocks, "--json").data
    assert (data["blocks"], data["stored_bytes"]) == (8, 8 * BLOCK_BYTES)
    assert data["allocated_bytes"] <= 8 << 20
    assert (data["damaged_records"], data["cut_off_blocks"]) == (0, 0)
    assert {each["namespace"]["model"]: each["blocks"] for each in data["namespaces"]} == {
        "a model": 5,
        "another model": 3,
    }
    plain = here("stat", blocks).stdout
    assert "8 blocks, 64 KiB of " in plain
    assert "nvme 5 blocks, 80 tokens, 40 KiB: a model, float32" in plain
    assert "shorter" not in plain


def test_the_directory_may_come_from_the_settings(
    here: Callable[..., Done], blocks: Path, home: Path
) -> None:
    (home / "kvstore.toml").write_text(f'[nvme]\npath = "{blocks}"\ncapacity_bytes = "8 MiB"\n')
    assert here("stat", "--json").data == here("stat", blocks, "--json").data


def test_verify_finds_nothing_wrong(here: Callable[..., Done], blocks: Path) -> None:
    plain, data = here("verify", blocks), here("verify", blocks, "--json")
    assert plain.status == data.status == 0
    assert plain.stdout == "8 blocks, 64 KiB read: all is well\n"
    assert data.data == {
        "store": str(blocks),
        "blocks": 8,
        "stored_bytes": 8 * BLOCK_BYTES,
        "findings": [],
        "ok": True,
    }


def test_verify_names_the_block_whose_byte_was_flipped(
    here: Callable[..., Done], blocks: Path
) -> None:
    victim = here("ls", "--blocks", blocks, "--json").data["blocks"][3]
    with open(blocks / "slab", "r+b") as slab:
        slab.seek(victim["offset"] + BLOCK_BYTES - 1)
        (byte,) = slab.read(1)
        slab.seek(-1, 1)
        slab.write(bytes([byte ^ 1]))
    data = here("verify", blocks, "--json")
    assert data.status == 1
    assert data.data["ok"] is False
    (finding,) = data.data["findings"]
    assert (finding["key"], finding["offset"]) == (victim["key"], victim["offset"])
    plain = here("verify", blocks)
    assert (plain.status, plain.stderr) == (1, "")
    assert plain.stdout.startswith(f"{victim['key']} at offset {victim['offset']}: ")
    assert plain.stdout.endswith(
        f"8 blocks, 64 KiB read: problems: 1\n`kvstore gc --damaged {blocks}` drops them\n"
    )
    # The store misses that block and serves the others.
    with kvstore.open(ram_bytes="4 MiB", nvme_path=blocks, nvme_bytes="8 MiB") as store:
        ours = kvstore.TokenChain(namespace(), range(80)).chain()
        theirs = kvstore.TokenChain(namespace("another model"), range(48)).chain()
        served = 0
        for chain in (ours, theirs):
            with store.acquire(chain) as lease:
                served += lease.wait()
                assert all(bytes(v) == bytes([i]) * BLOCK_BYTES for i, v in enumerate(lease.views))
        assert served < 8
        assert store.stats().misses["checksum"] == 1


def test_verify_of_a_truncated_file(here: Callable[..., Done], blocks: Path) -> None:
    with open(blocks / "slab", "r+b") as slab:
        slab.truncate(2 * BLOCK_BYTES)
    done = here("verify", blocks, "--json")
    assert done.status == 1
    assert len({finding["key"] for finding in done.data["findings"]}) == 6
    assert here("stat", blocks, "--json").data["cut_off_blocks"] == 6
    plain = here("stat", blocks)
    assert plain.status == 0
    assert "shorter than its records say, by 6 blocks; `kvstore verify` says more\n" in plain.stdout


def test_what_verify_finds_is_dropped_when_asked_for(
    here: Callable[..., Done], blocks: Path
) -> None:
    """A byte that was flipped, in a block whose record is sound, and the end of the slab."""
    listed = here("ls", "--blocks", blocks, "--json").data["blocks"]
    offsets = sorted(block["offset"] for block in listed)
    with open(blocks / "slab", "r+b") as slab:
        slab.seek(offsets[1])
        (byte,) = slab.read(1)
        slab.seek(-1, 1)
        slab.write(bytes([byte ^ 1]))
        slab.truncate(offsets[-1])
    assert here("gc", blocks, "--dry-run").stdout.startswith("0 damaged records and 0 blocks")
    said = "0 damaged records and 2 blocks (16 KiB) "
    assert here("gc", "--damaged", blocks, "--dry-run").stdout == f"{said}would be dropped\n"
    assert here("verify", blocks).status == 1
    none = here("gc", "--damaged", "--older-than", "1d", blocks)
    assert none.stdout == "0 damaged records and 0 blocks (0 B) dropped\n"
    assert here("gc", "--damaged", blocks) == Done(0, f"{said}dropped\n", "")
    assert here("verify", blocks) == Done(0, "6 blocks, 48 KiB read: all is well\n", "")
    again = here("gc", "--damaged", blocks)
    assert again.stdout == "0 damaged records and 0 blocks (0 B) dropped\n"


def test_gc_damaged_is_for_directories(here: Callable[..., Done], tmp_path: Path) -> None:
    done = here("gc", "--damaged", "--store", f"unix://{tmp_path}/none")
    assert done.status == 2
    assert "--damaged is for a directory; `kvstore verify` of a daemon drops" in done.stderr


def test_verify_shows_the_first_findings_and_counts_the_rest(
    here: Callable[..., Done], tmp_path: Path
) -> None:
    path = tmp_path / "blocks"
    with kvstore.open(ram_bytes="4 MiB", nvme_path=path, nvme_bytes="8 MiB") as store:
        fill(store, 30)
    (path / "slab").write_bytes(b"\xff" * (path / "slab").stat().st_size)
    assert len(here("verify", path, "--json").data["findings"]) == 30
    lines = here("verify", path).stdout.splitlines()
    assert len(lines) == 23
    assert lines[20:] == [
        "and 10 more; --json has them all",
        "30 blocks, 240 KiB read: problems: 30",
        f"`kvstore gc --damaged {path}` drops them",
    ]


@pytest.mark.parametrize("args", [["ls"], ["ls", "--chains"], ["ls", "--blocks"], ["stat"]])
def test_names_that_clients_chose_do_nothing_to_a_terminal(
    here: Callable[..., Done], tmp_path: Path, args: list[str]
) -> None:
    path = tmp_path / "blocks"
    with kvstore.open(ram_bytes="4 MiB", nvme_path=path, nvme_bytes="8 MiB") as store:
        fill(store, 1, model="\x1b]0;mine\x07\r\n" + "m" * 500)
    shown = here(*args, path).stdout
    assert "?]0;mine???mmm" in shown
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) < 250


def test_namespaces_without_blocks_are_not_shown(
    here: Callable[..., Done], blocks: Path, tmp_path: Path
) -> None:
    """Their records stay where there is room; what was evicted is not worth a line."""

    def shown(*where: object) -> list[str]:
        data = here("stat", *where, "--json").data
        assert here("stat", *where).stdout.count(" tokens, ") == len(data["namespaces"])
        return [each["namespace"]["model"] for each in data["namespaces"]]

    first, second = (each.fingerprint for each in (namespace(), namespace("another model")))
    assert here("evict", blocks, "--namespace", first.hex()).status == 0
    assert first in {each.fingerprint for each in read_directory(blocks).namespaces}
    assert shown(blocks) == ["another model"]
    with DaemonProcess(tmp_path, "--ram-bytes", "4 MiB", "--nvme-path", str(blocks)) as process:
        assert shown("--store", process.url) == ["another model"]
        assert here("evict", "--store", process.url, "--namespace", second.hex()).status == 0
        assert shown("--store", process.url) == []

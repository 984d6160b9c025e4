"""`kvstore evict`, `retain` and `gc`, of directories and of daemons."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lmdb
import pytest

import kvstore
from kvstore.daemon.tokens import Tenants
from kvstore.hashing import Chain
from kvstore.retention import Retention
from kvstore.tiers.nvme_directory import Sizes, capacity_of
from tests.cli.commands import Done, fill, namespace
from tests.cli.test_bad_input import refused
from tests.daemon.data_doors import DataDaemon
from tests.daemon.doors import DaemonProcess
from tests.daemon.tenants import SECRET, record

BLOCK_BYTES = 8192
OURS, THEIRS = namespace(), namespace("another model")


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    """Five blocks of one model, three of another."""
    path = tmp_path / "nvme"
    with kvstore.open(ram_bytes="4 MiB", nvme_path=path, nvme_bytes="8 MiB") as store:
        fill(store, 5)
        fill(store, 3, model="another model")
    return path


@pytest.fixture(params=["directory", "daemon"])
def place(request: pytest.FixtureRequest, blocks: Path, tmp_path: Path) -> Iterator[list[str]]:
    """Arguments that say where: the directory, or a daemon that serves it."""
    with ExitStack() as stack:
        if request.param == "directory":
            yield [str(blocks)]
        else:
            args = ("--ram-bytes", "1 MiB", "--nvme-bytes", "8 MiB", "--nvme-path", str(blocks))
            yield ["--store", stack.enter_context(DaemonProcess(tmp_path, *args)).url]


def flushed(place: list[str]) -> None:
    """A daemon tells NVMe of retentions and evictions in the background."""
    if place[0] == "--store":
        with kvstore.connect(place[1]) as client:
            assert client.flush(30)


def held(here: Callable[..., Done], place: list[str]) -> dict[str, int]:
    """Blocks by model, when NVMe has been told of everything."""
    flushed(place)
    listed = here("ls", "--json", *place).data["namespaces"]
    return {each["model"]: each["blocks"] for each in listed}


def rows(here: Callable[..., Done], place: list[str]) -> list[dict[str, Any]]:
    flushed(place)
    found: list[dict[str, Any]] = here("ls", "--blocks", "--json", *place).data["blocks"]
    return found


def chain(blocks: int, of: str = "a model") -> Chain:
    return kvstore.TokenChain(namespace(of), range(16 * blocks)).chain()


def test_evict_a_namespace(here: Callable[..., Done], place: list[str]) -> None:
    name = THEIRS.fingerprint.hex()
    assert here("evict", *place, "--namespace", name[:8]) == Done(0, "3 blocks dropped\n", "")
    assert held(here, place) == {"a model": 5}
    assert here("evict", *place, "--namespace", name, "--json").data["blocks"] == 0


def test_retain_a_namespace(here: Callable[..., Done], place: list[str]) -> None:
    name = THEIRS.fingerprint.hex()
    done = here("retain", *place, "--namespace", name, "--priority", "80", "--ttl", "1h", "--json")
    assert done.status == 0
    assert done.data["accepted"] == 3
    assert {row["priority"] for row in rows(here, place) if row["model"] == "another model"} == {80}
    assert {row["priority"] for row in rows(here, place) if row["model"] == "a model"} == {35}
    assert all(row["expires_s"] for row in rows(here, place) if row["priority"] == 80)
    plain = here("retain", *place, "--namespace", name, "--priority", "10")
    assert plain == Done(0, "3 blocks at priority 10\n", "")
    assert not any(row["expires_s"] for row in rows(here, place))


def test_what_a_namespace_may_not_hold_is_refused(here: Callable[..., Done], blocks: Path) -> None:
    bounded = ("--set", f"store.protected_bytes={3 * BLOCK_BYTES}")
    asked = ("--namespace", OURS.fingerprint.hex(), "--priority", "50")
    done = here("retain", blocks, *asked, *bounded)
    assert done.status == 1
    assert done.stdout.startswith("3 blocks at priority 50\n2 refused: ")
    # Those that come first in their prompts are kept.
    kept = {row["key"] for row in rows(here, [str(blocks)]) if row["priority"] == 50}
    assert kept == {key.hex() for key in chain(3)}


def test_what_was_granted_is_said(here: Callable[..., Done], blocks: Path) -> None:
    asked = ("--namespace", OURS.fingerprint.hex(), "--priority", "50", "--ttl", "30d")
    done = here("retain", blocks, *asked)
    assert done == Done(0, "5 blocks at priority 50, for 7 d at most\n", "")
    data = here("retain", blocks, *asked, "--json").data
    assert (data["clipped"], data["priority"], data["ttl_s"]) == (5, 50, 7 * 86_400.0)


def test_a_tenant_hears_of_its_cap(
    here: Callable[..., Done], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_CLIENT__TOKEN", "kvs_capped")
    tenants = Tenants([record("kvs_capped", "capped", "read", "write", priority_cap=50)], SECRET)
    with kvstore.open(ram_bytes="4 MiB") as store, DataDaemon(store, tenants) as daemon:
        at = ("--model", model, "--store", daemon.url)
        assert here("generate", *at, "--max-tokens", "1", "x" * 40).status == 0
        asked = ("retain", *at, "--prompt", "x" * 40, "--priority", "80")
        assert here(*asked) == Done(0, "2 blocks at priority 50, the tenant's cap\n", "")
        data = here(*asked, "--json").data
    assert (data["accepted"], data["clipped"], data["priority"]) == (0, 2, 50)


def test_gc_by_model_and_by_age(here: Callable[..., Done], place: list[str]) -> None:
    dry = here("gc", *place, "--model", "another model", "--dry-run", "--json")
    assert (dry.data["blocks"], dry.data["raw_bytes"]) == (3, 3 * BLOCK_BYTES)
    assert dry.data["dry_run"] is True
    assert held(here, place) == {"a model": 5, "another model": 3}
    none = here("gc", *place, "--model", "another model", "--older-than", "1d")
    assert none.stdout == "0 damaged records and 0 blocks (0 B) dropped\n"
    done = here("gc", *place, "--model", "another model", "--older-than", "1ms")
    assert done.stdout == "0 damaged records and 3 blocks (24 KiB) dropped\n"
    assert held(here, place) == {"a model": 5}
    assert here("gc", *place, "--json").data["blocks"] == 0
    assert held(here, place) == {"a model": 5}
    name = OURS.fingerprint.hex()
    assert here("gc", *place, "--namespace", name, "--json").data["blocks"] == 5
    assert held(here, place) == {}


def test_gc_leaves_what_was_used_lately(here: Callable[..., Done], blocks: Path) -> None:
    """Old is what nobody has used for so long, wherever it was used."""
    before = max(row["last_use_s"] for row in rows(here, [str(blocks)]))
    with (
        kvstore.open(ram_bytes="4 MiB", nvme_path=blocks, nvme_bytes="8 MiB") as store,
        store.acquire(chain(2)) as lease,
    ):
        lease.wait()
    after = rows(here, [str(blocks)])
    used = {row["key"] for row in after if row["last_use_s"] > before}
    assert used == {key.hex() for key in chain(2)}


def test_gc_drops_damaged_records(here: Callable[..., Done], blocks: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in blocks.iterdir()}
    with lmdb.open(str(blocks / "records.mdb"), subdir=False, max_dbs=3, lock=False) as env:
        records = env.open_db(b"records")
        with env.begin(write=True, db=records) as txn:
            keys = list(txn.cursor().iternext(values=False))
            for key in keys[:2]:
                record = bytearray(txn.get(key) or b"")
                record[40] ^= 1
                txn.put(key, bytes(record))
    assert here("verify", blocks).status == 1
    dry = here("gc", blocks, "--dry-run", "--json").data
    assert (dry["damaged_records"], dry["blocks"]) == (2, 0)
    assert here("verify", blocks).status == 1
    assert here("gc", blocks).stdout == "2 damaged records and 0 blocks (0 B) dropped\n"
    assert here("verify", blocks) == Done(0, "6 blocks, 48 KiB read: all is well\n", "")
    assert {path.name: path.stat().st_size for path in blocks.iterdir()} == sizes


def test_a_directory_keeps_its_size(here: Callable[..., Done], tmp_path: Path) -> None:
    """Whatever capacity the settings name: what is opened to be worked on stays as it is."""
    for number, capacity in enumerate(("1 MiB", "5000000", "48 MiB", "67108863")):
        path = tmp_path / str(number)
        with kvstore.open(ram_bytes="1 MiB", nvme_path=path, nvme_bytes=capacity) as store:
            fill(store, 5)
        before = {file.name: os.stat(file).st_size for file in path.iterdir()}
        assert here("evict", path, "--namespace", OURS.fingerprint.hex()[:8]).status == 0
        assert {file.name: os.stat(file).st_size for file in path.iterdir()} == before
        os.truncate(path / "records.mdb", 4096)
        assert Sizes.of(capacity_of(path)).slab_bytes >= before["slab"]


def test_a_leased_block_is_dropped_later(
    here: Callable[..., Done], blocks: Path, tmp_path: Path
) -> None:
    args = ("--ram-bytes", "1 MiB", "--nvme-bytes", "8 MiB", "--nvme-path", str(blocks))
    with DaemonProcess(tmp_path, *args) as process, process.connect() as client:
        with client.acquire(chain(5)) as lease:
            assert lease.wait() == 5
            here("gc", "--store", process.url, "--model", "a model")
            assert [bytes(view) for view in lease.views] == [bytes([i]) * 8192 for i in range(5)]
        here("gc", "--store", process.url, "--model", "a model")
        assert held(here, ["--store", process.url]) == {"another model": 3}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["evict"], "which blocks? give --namespace, or --prompt and --model"),
        (["retain", "--priority", "50"], "which blocks?"),
        (["retain", "--namespace", "abcd"], "Missing option '--priority'"),
        (["retain", "--namespace", "abcd", "--priority", "101"], "101 is not in the range"),
        (
            ["retain", "--namespace", "abcd", "--priority", "1", "--ttl", "soon"],
            "--ttl 'soon': not",
        ),
        (["retain", "--namespace", "abcd", "--priority", "1", "--ttl", "0s"], "--ttl '0s': must"),
        (["evict", "--namespace", "abcd"], "--namespace abcd: there is none"),
        (["evict", "--namespace", "abcd", "--prompt", "x"], "do not go together"),
        (["evict", "--chat"], "--chat goes with --prompt"),
        (["evict", "--prompt", "x"], "which model? give --model"),
        (["evict", "--prompt", "", "--model", "x"], "there is no prompt"),
        (
            ["gc", "--model", "nobody's"],
            "--model nobody's: no namespace is of it; models here: 'a model', 'another model'",
        ),
        (["gc", "--older-than", "7 moons"], "--older-than '7 moons': not a time"),
        (["gc", "--older-than", "9" * 400 + "d"], "--older-than"),
    ],
)
def test_bad_input(here: Callable[..., Done], blocks: Path, args: list[str], expected: str) -> None:
    refused(here(*args, blocks), expected)


def test_priorities_and_ttls_that_were_there_stay(here: Callable[..., Done], blocks: Path) -> None:
    """Working on a directory changes only what was asked."""
    with kvstore.open(ram_bytes="4 MiB", nvme_path=blocks, nvme_bytes="8 MiB") as store:
        store.retain(chain(2), Retention(priority=90, ttl_s=3600.0))
    before = rows(here, [str(blocks)])
    assert here("gc", blocks, "--model", "another model").status == 0
    assert rows(here, [str(blocks)]) == [row for row in before if row["model"] == "a model"]

"""The operator's commands with a running daemon: what they say of it, and where they find it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvstore
from kvstore.cli.stat import counts
from kvstore.client.client import StoreClient
from tests.cli.commands import Done, fill, namespace
from tests.cli.test_bad_input import refused
from tests.daemon.data_doors import DataDaemon
from tests.daemon.doors import DaemonProcess
from tests.daemon.tenants import OVERSEER, READER, TENANTS, THIEF, VICTIM

BLOCK_BYTES = 8192


@pytest.fixture
def process(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A real daemon: 1 MiB of RAM over 8 MiB of NVMe."""
    nvme = ("--nvme-path", str(tmp_path / "nvme"), "--nvme-bytes", "8 MiB")
    with DaemonProcess(tmp_path, "--ram-bytes", "1 MiB", *nvme) as process:
        yield process


@pytest.fixture
def client(process: DaemonProcess) -> Iterator[StoreClient]:
    """Has put five blocks of one model and three of another, and read four."""
    with process.connect() as client:
        chain = fill(client, 5).chain()
        fill(client, 3, model="another model")
        assert client.flush()
        with client.acquire(chain.slice(0, 4)) as lease:
            lease.wait()
        yield client


def test_stat_of_a_daemon(
    here: Callable[..., Done], process: DaemonProcess, client: StoreClient
) -> None:
    lease = client.acquire(kvstore.TokenChain(namespace(), range(32)).chain())
    data = here("stat", "--store", process.url, "--json").data
    lease.release()
    assert (data["store"], data["pid"]) == (process.url, process.pid)
    assert (data["ram"]["blocks"], data["nvme"]["blocks"]) == (8, 8)
    assert data["hits"] == {"ram": 4}  # the others count when they are released
    assert sorted(session["leases"] for session in data["sessions"]) == [0, 1]
    ours = next(each for each in data["namespaces"] if each["namespace"]["model"] == "a model")
    assert ours["tiers"]["nvme"] == {"blocks": 5, "stored_bytes": 5 * BLOCK_BYTES}

    plain = here("stat", "--store", process.url).stdout
    assert f"process {process.pid}" in plain
    assert "RAM   8 blocks, 64 KiB of 1 MiB (6%)\n" in plain
    assert "6 blocks asked for: 6 from RAM\n" in plain
    assert counts({"hits": {"nvme": 2, "ram": 1}, "misses": {}}) == (3, "2 from NVMe, 1 from RAM")
    assert "nvme 5 blocks, 80 tokens, 40 KiB: a model, float32" in plain


def test_stat_of_a_tenant(here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may only read is told what is its own."""
    monkeypatch.setenv("KVSTORE_CLIENT__TOKEN", READER)
    with kvstore.open(ram_bytes="1 MiB") as store, DataDaemon(store, TENANTS) as daemon:
        with daemon.connect(token=READER) as client:
            client.acquire(kvstore.TokenChain(namespace(), range(32)).chain()).release()
            plain = here("stat", "--store", daemon.url)
        data = here("stat", "--store", daemon.url, "--json").data
    assert (plain.status, plain.stderr) == (0, "")
    assert "2 blocks asked for: 2 missed (2 absent)\n" in plain.stdout
    assert data["misses"] == {"absent": 2}
    assert "sessions" not in data


def test_stat_says_whose_a_namespace_is(
    here: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To who may administer, and need not be able to read."""
    monkeypatch.setenv("KVSTORE_CLIENT__TOKEN", OVERSEER)
    with kvstore.open(ram_bytes="1 MiB") as store, DataDaemon(store, TENANTS) as daemon:
        for token, model in ((VICTIM, "a model"), (THIEF, "another model")):
            with daemon.connect(token=token) as client:
                fill(client, 2, model=model)
        fill(store, 2, model="nobody's")
        data = here("stat", "--store", daemon.url, "--json").data
        plain = here("stat", "--store", daemon.url).stdout
    assert {each["namespace"]["model"]: each["tenant"] for each in data["namespaces"]} == {
        "a model": "victim",
        "another model": "thief",
        "nobody's": None,
    }
    assert "another model, float32, tenant thief\n" in plain
    assert "nobody's, float32\n" in plain


def test_ls_of_a_daemon(
    here: Callable[..., Done], process: DaemonProcess, client: StoreClient
) -> None:
    asked = ("ls", "--store", process.url, "--json")
    assert [(each["model"], each["blocks"]) for each in here(*asked).data["namespaces"]] == [
        ("a model", 5),
        ("another model", 3),
    ]
    blocks = here(*asked, "--blocks").data["blocks"]
    assert len(blocks) == 8
    assert all(block["tiers"] == ["ram", "nvme"] for block in blocks)
    assert all(block["offset"] is not None and block["created_s"] for block in blocks)
    chains = here(*asked, "--chains").data["chains"]
    assert {chain["model"]: chain["length"] for chain in chains} == {
        "a model": 5,
        "another model": 3,
    }


def test_verify_of_a_daemon(
    here: Callable[..., Done],
    process: DaemonProcess,
    client: StoreClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvstore.cli.verify.STEP_BLOCKS", 7)
    asked = ("verify", "--store", process.url)
    assert here(*asked) == Done(0, "8 blocks, 64 KiB read: all is well\n", "")
    listed = here("ls", "--blocks", "--store", process.url, "--json").data["blocks"]
    victim = next(block for block in listed if block["model"] == "another model")
    with open(tmp_path / "nvme" / "slab", "r+b") as slab:
        slab.seek(victim["offset"])
        slab.write(b"\xff")
    done = here(*asked, "--json")
    assert done.status == 1
    (finding,) = done.data["findings"]
    assert (finding["key"], finding["offset"]) == (victim["key"], victim["offset"])
    assert here(*asked, "--json").data == {
        "store": process.url,
        "blocks": 7,
        "stored_bytes": 7 * BLOCK_BYTES,
        "findings": [],
        "ok": True,
    }


def test_where_a_store_is_looked_for(
    here: Callable[..., Done],
    process: DaemonProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DIR or --store; the daemon of the settings; one that runs; the directory of the settings."""
    other = tmp_path / "other"
    with kvstore.open(ram_bytes="1 MiB", nvme_path=other, nvme_bytes="8 MiB"):
        pass
    monkeypatch.setenv("KVSTORE_NVME__PATH", str(other))
    monkeypatch.setenv("KVSTORE_NVME__CAPACITY_BYTES", "8 MiB")

    def store(*args: str | Path) -> str:
        found: str = here("ls", *args, "--json").data["store"]
        return found

    assert store() == str(other)
    monkeypatch.setenv("KVSTORE_DAEMON__SOCKET", str(process.path))
    assert store() == process.url
    assert store(other) == str(other)
    monkeypatch.setenv("KVSTORE_DAEMON__SOCKET", str(tmp_path / "nobody"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left_behind:
        left_behind.bind(str(tmp_path / "nobody"))
    assert store() == str(other)
    monkeypatch.setenv("KVSTORE_ENGINE__STORE", process.url)
    assert store() == process.url
    assert store(other) == str(other)
    process.kill()
    assert here("ls").status == 1


def test_a_daemon_that_cannot_be_reached(here: Callable[..., Done], tmp_path: Path) -> None:
    for command in ("ls", "stat", "verify"):
        done = here(command, "--store", f"unix://{tmp_path}/nobody", "--json")
        assert (done.status, done.stdout) == (1, "")
        assert done.stderr == (
            f"kvstore: unix://{tmp_path}/nobody cannot be reached: "
            "[Errno 2] No such file or directory\n"
        )


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["x", "--store", "unix:///y"], "DIR and --store do not go together"),
        (["--store", "unix://y"], "'unix://y' names no daemon (the path must be absolute)"),
        (["--store", "unix:y/z"], "'unix:y/z' names no daemon (the path must be absolute)"),
        (["--store", "/run/kvstore.sock"], "give unix:///path/to/socket or kvstore://host:port"),
        (["--store", ""], "'' names no daemon"),
        (["--store", "http://[::1"], "names no daemon"),
        ([], "which store? give DIR, or the URL of a daemon as --store"),
    ],
)
def test_what_names_no_store(here: Callable[..., Done], args: list[str], expected: str) -> None:
    for command in ("ls", "stat", "verify"):
        refused(here(command, *args), expected)


def test_what_names_no_namespace(here: Callable[..., Done], tmp_path: Path) -> None:
    blocks = tmp_path / "blocks"
    with kvstore.open(ram_bytes="4 MiB", nvme_path=blocks, nvme_bytes="8 MiB") as store:
        fill(store, 1)
    refused(here("ls", blocks, "--namespace", "0123"), "--namespace 0123: there is none")
    refused(here("ls", blocks, "--namespace", "smollm2"), "hexadecimal digits")
    refused(here("ls", blocks, "--namespace", "ab"), "4 or more hexadecimal digits")

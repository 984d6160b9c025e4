"""The HTTP door: what it says, and to whom."""

from __future__ import annotations

import dataclasses
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.client.client import StoreClient
from kvstore.daemon import http_door
from kvstore.daemon.history import STEP_S, STEPS, History
from kvstore.daemon.http_door import HttpDoor, check_loopback
from kvstore.daemon.listening import Endpoint, parse_endpoint
from kvstore.errors import SettingsError
from kvstore.tiers.nvme import NvmeTier
from tests.cli.commands import kvstore
from tests.daemon.asking import HOSTILE, ask, port_of
from tests.daemon.conftest import MakeProcess
from tests.daemon.doors import Daemon
from tests.store.rig import BLOCK, NAMESPACE, PATIENCE_S, Rig, chain, get, put


@pytest.fixture
def door(daemon: Daemon) -> Iterator[HttpDoor]:
    """To `daemon`, on a port of its own."""
    door = daemon.run(HttpDoor.open(daemon.service, Endpoint("127.0.0.1", 0)))
    yield door
    daemon.run(door.close())


@pytest.fixture
def port(door: HttpDoor) -> int:
    return door.port


# ---- health


def test_healthy_and_ready(port: int) -> None:
    assert ask(port, "/healthz")[::2] == (200, b"ok\n")
    assert ask(port, "/readyz")[::2] == (200, b"ready\n")


def test_not_ready_once_the_drive_takes_nothing(port: int, rig: Rig) -> None:
    assert isinstance(rig.nvme, NvmeTier)
    with rig.nvme._slab.lock:
        rig.nvme._slab.failure = "enospc"
    reply = ask(port, "/readyz")
    assert reply.status == 503
    assert reply.text.startswith("NVMe takes no more blocks")
    assert reply.text.count("\n") == 1
    assert ask(port, "/healthz").status == 200
    metrics = ask(port, "/metrics").text.splitlines()
    assert {"kvstore_ready 0.0", "kvstore_nvme_read_only 1.0"} <= set(metrics)


def test_not_ready_while_the_drive_fails(port: int, rig: Rig) -> None:
    rig.gate.break_("write")
    for seed in range(20):
        put(rig.store, chain(1, seed=seed))
        rig.store.flush(PATIENCE_S)
    assert ask(port, "/readyz")[::2] == (
        503,
        b"NVMe fails or does not answer: the log says why; RAM is served\n",
    )
    assert "kvstore_nvme_breaker_open 1.0" in ask(port, "/metrics").text.splitlines()
    rig.gate.mend()


def test_not_ready_while_it_stops(port: int, daemon: Daemon) -> None:
    daemon.call(lambda: setattr(daemon.service, "stopping", True))
    reply = ask(port, "/readyz")
    assert reply.status == 503
    assert reply.text.startswith("stopping")


def test_after_the_store_has_ended(port: int, daemon: Daemon) -> None:
    daemon.store.close()
    assert ask(port, "/healthz").status == 200
    for path in ("/readyz", "/metrics", "/api/status"):
        assert ask(port, path)[::2] == (503, b"stopping\n")


# ---- what is told


def test_status_tells_what_is_so(port: int, client: StoreClient, rig: Rig) -> None:
    named = dataclasses.replace(NAMESPACE, model=HOSTILE, salt="5" * 32)
    put(client, chain(4))
    put(client, chain(2, namespace=named))
    assert rig.store.flush(PATIENCE_S)
    rig.drop_from_ram(chain(4))
    assert get(client, chain(5)) == 4
    assert get(client, chain(2, namespace=named)) == 2
    with client.acquire(chain(1)):
        told = ask(port, "/api/status").data
    assert told["not_ready"] is None
    assert told["hits"] == {"ram": 2, "nvme": 4}
    assert told["misses"] == {"absent": 1}
    assert told["flows"]["served_bytes"] == 6 * BLOCK
    assert told["flows"]["promoted_bytes"] == 4 * BLOCK
    assert [tier["name"] for tier in told["tiers"]] == ["ram", "nvme"]
    assert [tier["blocks"] for tier in told["tiers"]] == [6, 6]
    assert told["clients"]["leases"] == 1
    assert told["clients"]["in_flight_bytes"] == BLOCK
    (tenant,) = told["tenants"]["most"]
    assert (tenant["name"], tenant["asked"]) == ("local", 7)
    first, second = told["prefixes"]
    assert first["key"] == chain(1).keys[0].hex()[:12]
    assert first["longest_tokens"] == 4 * NAMESPACE.block_tokens
    assert first["share"] == pytest.approx(4 / 6)
    assert second["model"] == HOSTILE
    spaces = {held["model"]: held for held in told["namespaces"]["most"]}
    assert spaces["tiny"]["bytes"] == {"ram": 4 * BLOCK, "nvme": 4 * BLOCK}
    assert spaces[HOSTILE]["salted"]
    assert "5" * 32 not in ask(port, "/api/status").text
    assert [total(column) for column in told["history"].values()] == [
        *(2, 4, 1),
        *(6 * BLOCK, 6 * BLOCK, 4 * BLOCK, 6 * BLOCK),
    ]


def total(column: list[int]) -> int:
    return sum(column)


def test_lists_are_cut_and_say_so(port: int, client: StoreClient) -> None:
    for number in range(25):
        named = dataclasses.replace(NAMESPACE, model=f"model {number} " + "x" * 2_000)
        put(client, chain(1, namespace=named))
    told = ask(port, "/api/status").data["namespaces"]
    assert told["count"] == 25
    assert len(told["most"]) == 20
    assert all(len(held["model"]) == 80 for held in told["most"])


def test_history_keeps_the_last_steps(rig: Rig) -> None:
    put(rig.store, chain(3))
    history = History(rig.store.stats())
    for number in range(STEPS + 5):
        get(rig.store, chain(2 if number < 10 else 1))
        history.step(rig.store.stats())
    get(rig.store, chain(3))
    columns = history.columns(rig.store.stats())
    assert columns["ram"] == [2] * 5 + [1] * (STEPS - 5) + [3]
    assert columns["served_bytes"] == [BLOCK * blocks for blocks in columns["ram"]]
    assert columns["committed_bytes"] == [0] * (STEPS + 1)


def test_time_goes_on(daemon: Daemon, door: HttpDoor, client: StoreClient) -> None:
    """As every few seconds: another column of the chart, and old heat fades."""
    put(client, chain(1))
    put(client, chain(1, seed=1))
    for seed, times in ((0, 3), (1, 1)):
        for _ in range(times):
            assert get(client, chain(1, seed=seed)) == 1
    daemon.until(lambda: daemon.service.tenant_blocks["local"]["asked"] == 4)
    for _ in range(round(2 * http_door.HALF_LIFE_S / STEP_S)):
        daemon.call(door._step)
    assert get(client, chain(1, seed=1)) == 1
    daemon.until(lambda: daemon.service.tenant_blocks["local"]["asked"] == 5)
    told = ask(door.port, "/api/status").data
    assert told["history"]["ram"] == [0] * STEPS + [1]
    assert [hot["share"] for hot in told["prefixes"]] == pytest.approx([1.25 / 2, 0.75 / 2])
    daemon.store.close()
    daemon.call(door._step)


def test_metrics_as_prometheus_wants_them(port: int) -> None:
    reply = ask(port, "/metrics")
    assert reply.status == 200
    assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b"kvstore_build_info{" in reply.body
    assert b"process_resident_memory_bytes" in reply.body


# ---- the page


def test_the_page_runs_only_what_is_in_it(port: int) -> None:
    reply = ask(port, "/")
    assert reply.status == 200
    assert reply.headers["Content-Type"].startswith("text/html")
    policy = reply.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    page = reply.text
    assert page.count("<script>") == page.count("<script") == 1
    assert page.count("<style>") == page.count("<style") == 1
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "innerHTML" not in page
    assert " style=" not in page
    assert not re.search(r"\son\w+=", page)


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/api/status", "/nothing"])
def test_nothing_is_kept_or_guessed(port: int, path: str) -> None:
    headers = ask(port, path).headers
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Python" not in headers["Server"]


# ---- to whom


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:80", "127.9.9.9"])
def test_asked_for_by_a_name_of_this_machine(port: int, host: str) -> None:
    assert ask(port, "/healthz", Host=host).status == 200


@pytest.mark.parametrize("host", ["evil.example", "10.0.0.1", "localhost.evil.example", "[", ""])
def test_no_page_elsewhere_can_read_it(port: int, host: str) -> None:
    """Its name may be made to resolve to this machine; a browser says the name all the same."""
    assert ask(port, "/api/status", Host=host).status == 421


def test_a_probe_that_names_no_host(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as probe:
        probe.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
        assert probe.makefile("rb").read().startswith(b"HTTP/1.0 200")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed(port: int, method: str) -> None:
    assert ask(port, "/api/status", method).status == 405


def test_unknown_paths(port: int) -> None:
    assert ask(port, "/nothing").status == 404
    assert ask(port, "/static/../serve.py").status == 404


def test_connections_are_bounded(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_door, "CONNECTIONS", 2)
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
    try:
        for each in held:  # heard, so that they count
            each.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert each.recv(100).startswith(b"HTTP/1.1 200")
        with socket.create_connection(("127.0.0.1", port)) as more:
            assert more.recv(100) == b""
    finally:
        for each in held:
            each.close()


@pytest.mark.parametrize("text", ["0.0.0.0:1", ":7421", "192.0.2.1:7421", "[::]:7421"])
def test_only_this_machine_is_let_in(text: str) -> None:
    with pytest.raises(SettingsError, match="open to this machine only: listen on 127"):
        check_loopback(parse_endpoint(text, "daemon.http"))


# ---- as a process


def test_a_real_daemon(make_process: MakeProcess) -> None:
    process = make_process("--http", "127.0.0.1:0")
    with process.connect() as client:
        put(client, chain(3))
        assert get(client, chain(3)) == 3
        port = port_of(process)
        assert ask(port, "/readyz").status == 200
        assert ask(port, "/api/status").data["hits"] == {"ram": 3, "nvme": 0}
    assert process.end() == 0


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("nonsense", "must be HOST:PORT"),
        ("127.0.0.1:99999", "the port is too large: at most 65535"),
        ("0.0.0.0:7421", "open to this machine only"),
        ("127.0.0.1:PORT", "another process listens there"),
    ],
)
def test_an_address_that_cannot_be(tmp_path: Path, address: str, complaint: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = address.replace("PORT", str(taken.getsockname()[1]))
        done = kvstore(
            *(tmp_path, "daemon", "--socket", str(tmp_path / "s"), "--ram-bytes", "1MiB"),
            *("--http", address),
        )
    assert done.status == 2
    lines = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert len(lines) == 1
    assert complaint in lines[0]
    assert "daemon.http" in lines[0]


@pytest.mark.parametrize("missing", ["aiohttp", "prometheus_client"])
def test_what_to_install(tmp_path: Path, missing: str) -> None:
    """As where only the core was installed."""
    hidden = f"raise ModuleNotFoundError(\"No module named '{missing}'\", name='{missing}')"
    (tmp_path / f"{missing}.py").write_text(hidden)
    root = str(Path(__file__).parents[2])
    done = kvstore(
        *(tmp_path, "daemon", "--socket", str(tmp_path / "s"), "--http", "127.0.0.1:0"),
        PYTHONPATH=f"{tmp_path}:{root}",
    )
    assert done.status == 2
    assert done.stderr.count("\n") == 1
    assert (
        f"needs {missing}, which is not installed: pip install -e '.[daemon]' in its clone"
        in done.stderr
    )

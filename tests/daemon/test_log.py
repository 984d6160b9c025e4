"""What a daemon says of itself in its log, from its first line to its last."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import kvstore
from kvstore.version import __version__
from tests.cli.commands import environment
from tests.daemon.certificates import Authority
from tests.daemon.doors import DaemonProcess
from tests.store.rig import chain, put

TOKEN = "kvs_red"


def said(process: DaemonProcess) -> list[str]:
    """Its lines, without time and level."""
    return [re.split(r" (?:INFO|WARNING) +", line)[-1] for line in process.log.splitlines()]


def test_from_the_first_line_to_the_last(
    make_process: Callable[..., DaemonProcess], tmp_path: Path
) -> None:
    first = make_process()
    with first.connect() as client:
        assert put(client, chain(7)) == 7
    assert first.end() == 0
    lines = said(first)
    assert re.fullmatch(
        rf"kvstore {re.escape(__version__)}: 1 MiB of RAM; NVMe {tmp_path}/nvme with room for "
        r"[67][.\d]* MiB, 0 blocks found again; no settings file; no tokens; no TLS",
        lines[0],
    )
    assert lines[1] == f"ready: {first.url}"
    assert re.fullmatch(r"pid \d+ connected", lines[2])
    assert "ending: what is in RAM goes to NVMe for up to 30 s" in lines
    assert re.fullmatch(r"ended: \d blocks were still written to NVMe, 0 dropped", lines[-1])
    second = make_process()
    assert " MiB, 7 blocks found again; " in said(second)[len(lines)]


def test_blocks_that_are_dropped_are_counted(make_process: Callable[..., DaemonProcess]) -> None:
    """For the most part there is no time to write them; RAM and NVMe have room for all."""
    process = make_process("--set", "daemon.shutdown_s=0", "--set", "nvme.admission=priority")
    with process.connect() as client:
        assert put(client, chain(7)) == 7
    assert process.end() == 0
    assert said(process)[-1] == "ended: 0 blocks were still written to NVMe, 7 dropped"


def test_without_nvme_nothing_is_said_of_it(tmp_path: Path) -> None:
    (tmp_path / "kvstore.toml").write_text('[ram]\ncapacity_bytes = "1 MiB"\n')
    with DaemonProcess(tmp_path) as process, process.connect() as client:
        assert put(client, chain(7)) == 7
        assert process.end() == 0
        first, *lines, last = said(process)
    assert f"1 MiB of RAM; no NVMe; settings of {tmp_path}/kvstore.toml; " in first
    assert "ending: without NVMe, what is in RAM is dropped" in lines
    assert last == "ended: 7 blocks were dropped"


def test_doors_and_tenants_are_named(
    make_process: Callable[..., DaemonProcess], tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens.toml"
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    tokens.write_text(f'[[token]]\nsha256 = "{digest}"\ntenant = "red"\n')
    tokens.chmod(0o600)
    authority = Authority(tmp_path / "ours")
    certificate, key = authority.sign("daemon")
    settings = {
        "tokens": tokens,
        "tls_certificate": certificate,
        "tls_key": key,
        "listen": "127.0.0.1:0",
        "zmq": "tcp://127.0.0.1:*",
        "zmq_replay": "tcp://127.0.0.1:*",
    }
    process = make_process(*(f"--set=daemon.{name}={value}" for name, value in settings.items()))
    lines = said(process)
    assert lines[0].endswith("; tokens: 1; TLS")
    events = r"ready: KV events on tcp://127.0.0.1:\d+, sent again on tcp://127.0.0.1:\d+"
    assert any(re.fullmatch(events, line) for line in lines)
    url = re.findall(r"kvstore://127.0.0.1:\d+", process.log)[-1]
    with kvstore.connect(url, token=TOKEN, ca=authority.ca) as client:
        assert client.is_connected
        assert any(line.endswith(" of red connected") for line in said(process))


def test_a_relative_socket_is_announced_as_clients_name_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvstore", "daemon", "--socket", "s.sock"]
    with (
        subprocess.Popen(
            [*command, "--ram-bytes", "1 MiB"],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(tmp_path),
            cwd=tmp_path,
        ) as daemon,
        ExitStack() as ending,
    ):
        ending.callback(daemon.kill)  # before it is waited for, whatever fails here
        assert daemon.stderr is not None
        url = next(line.split()[-1] for line in daemon.stderr if " ready: " in line)
        assert url == f"unix://{tmp_path}/s.sock"
        with kvstore.connect(url) as client:
            assert put(client, chain(1)) == 1
        daemon.send_signal(signal.SIGTERM)
        assert daemon.stderr.read()
        assert daemon.wait() == 0

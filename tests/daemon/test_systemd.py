"""The systemd unit: understood by systemd, and by the daemon that it starts."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import kvstore

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "packaging" / "kvstore.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    program = tmp_path / "kvstore"
    program.symlink_to("/bin/true")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/kvstore/bin/kvstore", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if unit.name in line]) == (
        0,
        [],
    )


def test_the_daemon_does_what_the_unit_expects(tmp_path: Path) -> None:
    """Started as systemd would: told of readiness, the socket where it says, a clean end."""
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    (options,) = [line for line in UNIT.read_text().splitlines() if line.startswith("ExecStart=")]
    words = options.split()[1:]
    words[words.index("--nvme-path") + 1] = str(tmp_path / "blocks")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "RUNTIME_DIRECTORY": str(runtime),
            "KVSTORE_RAM__CAPACITY_BYTES": "16 MiB",
            "KVSTORE_NVME__CAPACITY_BYTES": "16 MiB",
        }
        command = [sys.executable, "-m", "kvstore", *words]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE) as daemon:
            assert systemd.recv(100) == b"READY=1"
            url = f"unix://{runtime}/kvstore.sock"
            with kvstore.connect(url) as client:
                assert client.stats().nvme["blocks"] == 0
            daemon.send_signal(signal.SIGTERM)
            assert systemd.recv(100) == b"STOPPING=1"
            assert daemon.wait(30) == 0
    assert not (runtime / "kvstore.sock").exists()

"""kill -9 of the daemon under load: clients miss, and hit again; nothing stops the next one."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from random import Random

import pytest

from kvstore.client.client import StoreClient
from kvstore.hashing import Chain
from tests.cli.commands import environment
from tests.daemon.conftest import MakeProcess
from tests.daemon.doors import DaemonProcess
from tests.daemon.victim import work
from tests.kill.test_kill import holders
from tests.kill.victims import spin
from tests.store.rig import PATIENCE_S, chain, check_bytes, get, put

KILLS = 5
CLIENTS = 3
LONGEST_LIFE_S = 0.05


@pytest.mark.parametrize("seed", [0])
def test_five_kills(make_process: MakeProcess, seed: int) -> None:
    campaign(make_process, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 11))
def test_fifty_kills(make_process: MakeProcess, seed: int) -> None:
    campaign(make_process, seed)


class Worker:
    """A client at work in a thread until it is told to end."""

    def __init__(self, client: StoreClient, seed: int) -> None:
        self.client = client
        self.operations = 0
        self.error: BaseException | None = None
        self._random = Random(seed)
        self._told = threading.Event()
        self._turn = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def has_worked(self) -> None:
        """Wait until it has done something more, and then something more again."""
        for _ in range(2):
            assert self._turn.acquire(timeout=PATIENCE_S), self.error

    def end(self) -> None:
        self._told.set()
        self._thread.join()
        self.client.close()
        assert self.error is None

    def _run(self) -> None:
        try:
            while not self._told.is_set():
                work(self.client, self._random)
                self._turn.release()
                if not self.client.is_connected:  # misses cost nothing: leave the cores to others
                    self._told.wait(0.005)
        except BaseException as error:
            self.error = error


def campaign(make_process: MakeProcess, seed: int) -> None:
    """Kill it, and start it again over what it left; the clients are the same all the time."""
    random = Random(seed)
    process = make_process()
    known = chain(8, seed=900)
    put_on_nvme(process, known)
    workers = [Worker(process.connect(), seed * 10 + number) for number in range(CLIENTS)]
    try:
        for _ in range(KILLS):
            for worker in workers:
                worker.has_worked()
            spin(LONGEST_LIFE_S * random.random())
            inodes = memory_of(process)
            process.kill()
            for worker in workers:
                worker.has_worked()  # of misses, and not of errors
            process = make_process()
            until_connected(workers)
            with process.connect() as client:
                assert client.probe(known).prefix == 8
                assert get(client, known) == 8
    finally:
        for worker in workers:
            worker.end()
    assert holders(inodes) == []
    assert process.end() == 0


def test_told_to_end_under_load(make_process: MakeProcess) -> None:
    """With leases, slots and fills under way: it ends as it should, and has written everything."""
    process = make_process()
    workers = [Worker(process.connect(), number) for number in range(CLIENTS)]
    try:
        with process.connect() as client:
            put(client, chain(8, seed=900))
            held, reservation = client.acquire(chain(8, seed=900)), client.reserve(chain(2, 901))
            for worker in workers:
                worker.has_worked()
            assert process.end() == 0
            assert check_bytes(held, chain(8, seed=900)) == 8
            assert reservation.commit() == 0
            held.release()
            for worker in workers:
                worker.has_worked()
        again = make_process()
        until_connected(workers)
        with again.connect() as client:
            assert client.probe(chain(8, seed=900)).tiers == ["nvme"] * 8
            assert get(client, chain(8, seed=900)) == 8
    finally:
        for worker in workers:
            worker.end()


def put_on_nvme(process: DaemonProcess, known: Chain) -> None:
    with process.connect() as client:
        assert put(client, known) == 8
        assert client.flush()


def until_connected(workers: list[Worker]) -> None:
    for worker in workers:
        for _ in range(1000):
            if worker.client.is_connected:
                break
            worker._told.wait(0.01)
        assert worker.client.is_connected, worker.client._why_away


def memory_of(process: DaemonProcess) -> set[int]:
    """Inodes of the shared memory that the daemon has mapped."""
    lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    return {int(line.split()[4]) for line in lines if "/memfd:kvstore" in line}


@pytest.mark.parametrize("other", ["directory", "socket"])
def test_a_second_daemon_is_refused(process: DaemonProcess, tmp_path: Path, other: str) -> None:
    """Of the same socket and of the same directory, whatever else is different."""
    path = tmp_path / "other.sock" if other == "socket" else process.path
    nvme = tmp_path / ("other" if other == "directory" else "nvme")
    command = [sys.executable, "-m", "kvstore", "daemon", "--socket", str(path)]
    command += ["--ram-bytes", "1 MiB", "--nvme-path", str(nvme), "--nvme-bytes", "8 MiB"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        cwd=tmp_path,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    said = {"directory": "another process is listening there", "socket": "in use"}
    assert said[other] in line
    assert str(path if other == "directory" else nvme) in line
    with process.connect() as client:
        assert put(client, chain(2)) == get(client, chain(2)) == 2
    assert path.exists() == (other == "directory")


@pytest.mark.parametrize("left", ["a socket", "a file", "a folder"])
def test_what_is_in_the_way_of_the_socket(
    make_process: MakeProcess, tmp_path: Path, left: str
) -> None:
    """A dead daemon's socket is replaced; what is none of ours is left alone."""
    path = tmp_path / "kvstore.sock"
    if left == "a socket":
        make_process().kill()
        assert path.is_socket()
        with make_process().connect() as client:
            assert put(client, chain(2)) == 2
        return
    if left == "a file":
        path.write_text("precious")
    else:
        path.mkdir()
    with pytest.raises(RuntimeError, match=r"kvstore\.sock: no socket can be made there"):
        make_process()
    assert path.exists()

"""What the daemon takes beside its arena: bounded, however much it is asked."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from kvstore.client.client import StoreClient
from tests.daemon.conftest import MakeProcess
from tests.daemon.doors import DaemonProcess
from tests.daemon.victim import work
from tests.store.rig import chain, put

MiB = 1 << 20
ARENA_BYTES = 256 * MiB
OPERATIONS = 50_000
GROWTH_BYTES = 8 * MiB  # after a tenth of the operations


@pytest.mark.parametrize("operations", [OPERATIONS])
def test_fifty_thousand_operations(make_process: MakeProcess, operations: int) -> None:
    endure(make_process, operations)


@pytest.mark.soak
@pytest.mark.parametrize("operations", [1_000_000])
def test_a_million_operations(make_process: MakeProcess, operations: int) -> None:
    endure(make_process, operations)


def endure(make_process: MakeProcess, operations: int) -> None:
    """Mixed operations, clients that come and go, leases and slots that are just dropped."""
    random = Random(operations)
    process = make_process("--ram-bytes", f"{ARENA_BYTES} B")
    early_bytes = 0
    for tenth in range(10):
        with process.connect() as client:
            for _ in range(operations // 10):
                operate(client, random)
        if tenth == 0:
            early_bytes = own_bytes(process)
    late_bytes = own_bytes(process)
    print(f"{early_bytes / MiB:.1f} MiB after a tenth, {late_bytes / MiB:.1f} MiB at the end")
    assert late_bytes <= ARENA_BYTES // 4
    assert late_bytes - early_bytes <= GROWTH_BYTES


def operate(client: StoreClient, random: Random) -> None:
    """Mostly what clients do most; now and then something new, given up, or forgotten."""
    match random.randrange(40):
        case 0:
            put(client, chain(4, seed=random.randrange(1_000)))
        case 1:
            work(client, random)
        case 2:
            client.acquire(chain(8, seed=random.randrange(30)))
        case 3:
            client.reserve(chain(2, seed=random.randrange(30)))
        case 4:
            client.stats()
        case _:
            blocks = PROMPTS[random.randrange(30)]
            if random.random() < 0.5:
                client.acquire(blocks).release()
            else:
                client.probe(blocks)


PROMPTS = [chain(8, seed=number) for number in range(30)]


def own_bytes(process: DaemonProcess) -> int:
    """Memory of the process that is not shared: without the arena."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10

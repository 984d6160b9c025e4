"""Engines and raw clients on one daemon: every byte is right, and nothing is left after them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.daemon.doors import Daemon
from tests.daemon.victims import Clients
from tests.store.rig import Rig, RunningClock

RAW, ENGINES = 4, 2


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Less RAM than the crowd puts, and NVMe for about as much."""
    rig = Rig(tmp_path / "nvme", ram_blocks=256, nvme_bytes=16 << 20, clock=RunningClock())
    yield rig
    rig.finish()


@pytest.mark.parametrize(("operations", "answers"), [(2_000, 12)])
def test_a_tenth(daemon: Daemon, rig: Rig, operations: int, answers: int) -> None:
    crowd(daemon, rig, operations, answers)


@pytest.mark.soak
@pytest.mark.parametrize(("operations", "answers"), [(20_000, 120)])
def test_ten_minutes_worth(daemon: Daemon, rig: Rig, operations: int, answers: int) -> None:
    crowd(daemon, rig, operations, answers)


def crowd(daemon: Daemon, rig: Rig, operations: int, answers: int) -> None:
    with ExitStack() as stack:
        raw = [stack.enter_context(Clients()) for _ in range(RAW)]
        engines = [
            stack.enter_context(Clients("tests.daemon.engine_client")) for _ in range(ENGINES)
        ]
        for seed, engine in enumerate(engines):
            engine.start(daemon.url, seed, answers)
        for seed, client in enumerate(raw):
            client.start(daemon.url, seed, operations)
        assert [each.ended() for each in (*raw, *engines)] == [0] * (RAW + ENGINES)
    daemon.until(lambda: not daemon.service.sessions)
    rig.until(rig.is_quiet)
    rig.store.check_invariants()
    stats = rig.store.stats()
    index = rig.ram.slots.index
    held_bytes = sum(index.nbytes.item(row) for row in index.rows_by_key.values())
    assert stats.ram["pinned_blocks"] == 0
    assert stats.ram["used_bytes"] == held_bytes
    # The crowd had to share: RAM was too small, NVMe was read, and hits are most of it.
    assert min(stats.hits["ram"], stats.hits["nvme"], stats.ram["evicted_blocks"]) > 100
    asked = daemon.service.tenant_blocks["local"]
    assert asked["asked"] == sum(stats.hits.values()) + sum(stats.misses.values())
    assert asked["asked"] == sum(count for name, count in asked.items() if name != "asked")

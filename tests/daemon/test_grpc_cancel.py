"""gRPC calls that end in the middle: of a stream, of a wait, of a put."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.doors import Daemon
from tests.daemon.grpc_client import GrpcClient, holds_nothing
from tests.store.rig import BLOCK, Rig, RunningClock, chain, content, get, put

BLOCKS = 1024  # 8 MiB: more than a connection takes while nobody reads


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "nvme", ram_blocks=BLOCKS, nvme_bytes=16 << 20, clock=RunningClock())
    yield rig
    rig.finish()


def test_who_does_not_read_holds_up_nobody(
    remote: GrpcClient,
    address: str,
    daemon: Daemon,
    rig: Rig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    blocks = chain(BLOCKS)
    put(rig.store, blocks)
    call = remote.start_get(blocks)
    next(call)
    daemon.until(lambda: len(daemon.service.sessions) == 1)
    with GrpcClient(address) as another:
        assert another.get(blocks.slice(0, 300)).blocks == 300
    daemon.until(lambda: len(daemon.service.sessions) == 1)  # the first still waits to be read
    assert rig.store.stats().ram["pinned_blocks"] == BLOCKS
    call.cancel()
    holds_nothing(daemon)
    assert caplog.messages == []  # it is no error of the daemon's


def test_a_dead_connection_ends_its_calls(
    remote: GrpcClient, address: str, daemon: Daemon, rig: Rig
) -> None:
    put(rig.store, chain(BLOCKS // 2))
    another = GrpcClient(address)
    next(another.start_get(chain(BLOCKS // 2)))
    writing = another.start_put(chain(8, seed=1))
    writing.send(bytes(BLOCK))
    (session,) = daemon.service.sessions
    assert len(session.reservations) == 1
    another.close()
    holds_nothing(daemon)
    assert rig.store.stats().ram["blocks"] == BLOCKS // 2
    assert rig.store.stats().ram["used_bytes"] == BLOCKS // 2 * BLOCK


def one_call(rng: random.Random, client: GrpcClient) -> None:
    """A get or a put, given up at some point, or not."""
    blocks = chain(rng.randrange(1, BLOCKS // 2), seed=rng.randrange(4))
    given_up = rng.choice([True, True, False])
    if rng.random() < 0.5:
        call = client.start_get(blocks)
        for _ in range(rng.randrange(4) if given_up else 1 << 30):
            if next(call, None) is None:
                break
        call.cancel()
        return
    with client.start_put(blocks) as writing:
        data = b"".join(content(blocks.keys[i]) for i in writing.wanted)
        writing.send(data[: rng.randrange(len(data) + 1)] if given_up else data)
        if not given_up:
            assert writing.end() <= len(writing.wanted)


@pytest.mark.parametrize(
    "calls", [pytest.param(40, id="40"), pytest.param(2_000, marks=pytest.mark.soak, id="2000")]
)
def test_calls_given_up_anywhere(
    calls: int,
    remote: GrpcClient,
    address: str,
    daemon: Daemon,
    rig: Rig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = random.Random(7)
    with GrpcClient(address) as another:
        for _ in range(calls):
            one_call(rng, rng.choice([remote, another]))
            if rng.random() < 0.1:
                rig.store.evict(chain(BLOCKS // 2, seed=rng.randrange(4)))
        holds_nothing(daemon)
        rig.until(rig.is_quiet)
        for seed in range(4):
            held = chain(BLOCKS // 2, seed=seed)
            got = another.get(held)
            assert got.data == b"".join(content(key) for key in held.keys[: got.blocks])
            assert get(rig.store, held) == got.blocks
    ram = rig.store.stats().ram
    assert ram["used_bytes"] == ram["blocks"] * BLOCK
    assert caplog.messages == []

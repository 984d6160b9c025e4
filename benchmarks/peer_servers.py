"""The daemon beside Redis, Mooncake and LMCache's server: blocks into another process, and back.

Same bytes, same block sizes, in the same run; put is from the caller's buffers
until the last block can be found, get is into the caller's buffers. Each peer
runs as its makers mean it to on one machine, and as fast as it could be made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple

import numpy as np

import kvstore
from benchmarks import blocks
from benchmarks.daemon import ROOM_BYTES
from benchmarks.harness import Bench, Benchmark, Workload
from benchmarks.peers import python_of
from benchmarks.ram import get, putting
from benchmarks.servers import LOCAL_HOST, ServerError, daemon, free_port, server
from benchmarks.workers.lines import Worker, WorkerError
from kvstore.bench.rows import NotHereError, Row
from kvstore.bench.turns import Turn, rates, timed

AHEAD = 5.0  # times as fast as each of them
# A fifth more than without, here; more lanes, or other slices, gained nothing.
MOONCAKE_ENV = {"MC_TCP_ENABLE_CONNECTION_POOL": "1"}

Opening = Callable[[Bench, Workload], AbstractContextManager[Worker]]


class Peer(NamedTuple):
    """`open` starts its server and gives a worker that is its client."""

    name: str
    title: str
    open: Opening


@contextmanager
def _redis(bench: Bench, workload: Workload) -> Iterator[Worker]:
    program = shutil.which("redis-server")
    if program is None:
        raise NotHereError("redis-server is not installed (Debian: apt-get install redis-server)")
    path = bench.directory / "redis.sock"
    unsaved = ["--save", "", "--appendonly", "no"]
    command = [program, "--port", 0, "--unixsocket", path, "--dir", bench.directory, *unsaved]
    with (
        _client("redis", workload, path) as worker,
        server(command, str(path), bench.directory / "redis.log"),
    ):
        yield worker


@contextmanager
def _mooncake(bench: Bench, workload: Workload) -> Iterator[Worker]:
    """A master, a process that lends its memory, and a client of both."""
    programs = python_of("mooncake").parent
    master, metrics, lender = free_port(), free_port(), free_port()
    room_bytes = workload.total_bytes * 5 // 4 + (64 << 20)
    keeping = [programs / "mooncake_master", "--rpc_port", master, "--metrics_port", metrics]
    lending = [programs / "mooncake_client", "--host", LOCAL_HOST, "--port", lender]
    lending += ["--master_server_address", f"{LOCAL_HOST}:{master}"]
    lending += ["--metadata_server", "P2PHANDSHAKE", "--global_segment_size", room_bytes]
    env = {**os.environ, **MOONCAKE_ENV}
    log = bench.directory / "mooncake.log"
    with (
        _client("mooncake", workload, LOCAL_HOST, master, env=MOONCAKE_ENV) as worker,
        server(keeping, (LOCAL_HOST, master), bench.directory / "mooncake_master.log", env),
        server(lending, (LOCAL_HOST, lender), log, env),
    ):
        yield worker


@contextmanager
def _lmcache(bench: Bench, workload: Workload) -> Iterator[Worker]:
    port = free_port()
    command = [python_of("lmcache"), "-m", "lmcache.v1.server", LOCAL_HOST, port, "cpu"]
    url = f"lm://{LOCAL_HOST}:{port}"
    with (
        _client("lmcache", workload, url) as worker,
        server(command, (LOCAL_HOST, port), bench.directory / "lmcache.log"),
    ):
        yield worker


def _client(
    peer: str, workload: Workload, *arguments: object, env: Mapping[str, str] | None = None
) -> Worker:
    """It connects when it is first asked for something."""
    return Worker(
        python_of(peer),
        f"benchmarks.workers.{_MODULES[peer]}",
        *arguments,
        workload.block_bytes,
        workload.count,
        env={"OMP_NUM_THREADS": "1", **(env or {})},
    )


_MODULES = {
    "redis": "redis_worker",
    "mooncake": "mooncake_worker",
    "lmcache": "lmcache_server_worker",
}

PEERS = (
    Peer("redis", "Redis", _redis),
    Peer("mooncake", "Mooncake", _mooncake),
    Peer("lmcache", "LMCache's server", _lmcache),
)


def measure(bench: Bench, workload: Workload, peer: Peer) -> Iterator[Row]:
    with ExitStack() as opened:
        try:
            worker = opened.enter_context(peer.open(bench, workload))
            described = worker.ask("describe")
        except (ServerError, WorkerError) as error:
            raise NotHereError(f"{peer.title} does not start: {error}") from error
        rate = _rates(bench, workload, worker)
    for verb in ("put", "get"):
        yield Row(
            name=f"daemon {verb} {workload.label}, beside {peer.title}",
            group="daemon",
            value=rate[verb],
            unit="GB/s",
            ceiling=rate[f"peer {verb}"],
            against=described,
            at_least=AHEAD,
            checksums="neither: the bytes never left RAM",
        )


def _rates(bench: Bench, workload: Workload, worker: Worker) -> dict[str, float]:
    chain = blocks.chain(workload)
    data = blocks.random_bytes(workload)
    out = blocks.buffers(workload)
    source, target = blocks.views(data), blocks.views(out)
    with (
        daemon(bench.directory, workload.total_bytes + ROOM_BYTES) as path,
        kvstore.connect(f"unix://{path}") as store,
    ):
        turns: dict[str, Turn] = {
            "put": putting(store, chain, source),
            "peer put": worker.turn("put"),
            "get": timed(lambda: get(store, chain, target)),
            "peer get": worker.turn("get"),
        }
        rate = rates(turns, bench.effort.rounds, workload.total_bytes)
    if not np.array_equal(out, data):
        raise RuntimeError("what came out of the daemon is not what went in")
    return rate


def _benchmark(peer: Peer, index: int, label: str) -> Benchmark:
    def run(bench: Bench) -> Iterator[Row]:
        return measure(bench, bench.effort.workloads[index], peer)

    return Benchmark(f"daemon/{peer.name}/{label}", "daemon", run)


BENCHMARKS = tuple(
    _benchmark(peer, index, label)
    for index, label in enumerate(("2MiB", "128KiB"))
    for peer in PEERS
)

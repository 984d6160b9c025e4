"""The daemon's TCP door, beside one bare TCP stream that carries the same blocks.

The stream goes from this process's memory into memory of another, and back. So
does the row: put is reserve and commit, of blocks that were made where `views`
said; get is from acquire until the last block lies in this process's memory.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

import kvstore
from benchmarks import blocks
from benchmarks.blocks import Blocks
from benchmarks.daemon import ROOM_BYTES
from benchmarks.harness import Bench, Benchmark, Workload
from benchmarks.servers import LOCAL_HOST, daemon, free_port, server
from benchmarks.workers.lines import ROOT
from benchmarks.workers.stream_server import DONE, GET, PUT, receive
from kvstore.bench.rows import Row
from kvstore.bench.turns import Turn, rates, timed
from kvstore.hashing import Chain
from kvstore.verbs import Store

AT_LEAST = 0.85


def measure(bench: Bench, workload: Workload) -> Iterator[Row]:
    chain = blocks.chain(workload)
    data = blocks.random_bytes(workload)
    out = blocks.buffers(workload)
    port, bare_port = free_port(), free_port()
    command = [sys.executable, "-m", "benchmarks.workers.stream_server", bare_port]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with ExitStack() as opened:
        bare_server = server(
            [*command, workload.total_bytes],
            (LOCAL_HOST, bare_port),
            bench.directory / "stream.log",
            env,
        )
        opened.enter_context(bare_server)
        bare = opened.enter_context(socket.create_connection((LOCAL_HOST, bare_port)))
        bare.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        room_bytes = workload.total_bytes + ROOM_BYTES
        opened.enter_context(daemon(bench.directory, room_bytes, port))
        store = opened.enter_context(kvstore.connect(f"kvstore://{LOCAL_HOST}:{port}"))
        rate = rates(
            {
                "stream put": timed(lambda: _send(bare, blocks.views(data))),
                "put": _putting(store, chain, blocks.views(data)),
                "stream get": timed(lambda: _fetch(bare, out)),
                "get": _getting(store, chain),
            },
            2 * bench.effort.rounds,
            workload.total_bytes,
        )
        _check(store, chain, data)
    if not np.array_equal(out, data):
        raise RuntimeError("what came through the stream is not what went in")
    for verb in ("put", "get"):
        yield Row(
            name=f"daemon {verb} {workload.label}, over TCP",
            group="daemon",
            value=rate[verb],
            unit="GB/s",
            ceiling=rate[f"stream {verb}"],
            against="one bare TCP stream to another process, loopback",
            at_least=AT_LEAST,
            checksums="nobody but TCP",
        )


def _send(sock: socket.socket, source: Blocks) -> None:
    sock.sendall(PUT)
    for block in source:
        sock.sendall(block)
    if sock.recv(1) != DONE:
        raise RuntimeError("the other side did not take all blocks")


def _fetch(sock: socket.socket, target: NDArray[np.uint8]) -> None:
    sock.sendall(GET)
    receive(sock, target.reshape(-1).data)


def _putting(store: Store, chain: Chain, source: Blocks) -> Turn:
    def turn() -> float:
        store.evict(chain)
        start = time.perf_counter()
        with store.reserve(chain) as reservation:
            reserved_s = time.perf_counter() - start
            blocks.copy(reservation.views, source)
            start = time.perf_counter()
            if reservation.commit() != len(chain):
                raise RuntimeError("the daemon did not take all blocks")
            return reserved_s + time.perf_counter() - start

    return turn


def _getting(store: Store, chain: Chain) -> Turn:
    def turn() -> float:
        start = time.perf_counter()
        with store.acquire(chain) as lease:
            ready = lease.wait()
            seconds = time.perf_counter() - start
            if ready != len(chain):
                raise RuntimeError(f"only {ready} of {len(chain)} blocks served: {lease.miss}")
        return seconds

    return turn


def _check(store: Store, chain: Chain, data: NDArray[np.uint8]) -> None:
    with store.acquire(chain) as lease:
        lease.wait()
        served = [np.frombuffer(view, np.uint8) for view in lease.views]
        if len(served) != len(chain) or not np.array_equal(np.stack(served), data):
            raise RuntimeError("what came out of the daemon is not what went in")
        del served


def _benchmark(index: int, label: str) -> Benchmark:
    return Benchmark(
        f"daemon/tcp/{label}", "daemon", lambda bench: measure(bench, bench.effort.workloads[index])
    )


BENCHMARKS = (_benchmark(0, "2MiB"), _benchmark(1, "128KiB"))

"""Clients that are killed, or that make a crowd: processes of their own, forked one for a line.

`python -m tests.daemon.victim` imports once, and forks a child for every line of stdin:
`URL SEED OPERATIONS STATE`. A child works on prompts that all children share, compares every
byte it gets, then, for a state of STATES, gets into it, says so, and stays there; for "work" it
ends. What it says is a line; "ended STATUS" comes when it is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from random import Random

from kvstore.compose import connect
from kvstore.hashing import Chain
from kvstore.retention import Retention
from kvstore.verbs import Store
from tests.store.rig import chain, check_bytes, content, fill, get, put

STATES = ("reserved", "half-written", "leased", "filling", "working")
PROMPTS = 30  # of 8 blocks, of which half are common to two of them: more than RAM holds
BLOCKS = 8


def prompt(number: int) -> Chain:
    return chain(BLOCKS, seed=number)


def work(store: Store, random: Random) -> None:
    """One operation on a prompt at random."""
    blocks = prompt(random.randrange(PROMPTS)).slice(0, random.randint(1, BLOCKS))
    match random.randrange(12):
        case 0 | 1 | 2 | 3:
            get(store, blocks)
        case 4 | 5 | 6:
            put(store, blocks)
        case 7:
            with store.acquire(blocks) as lease, store.reserve(blocks) as reservation:
                fill(reservation.views, [blocks.keys[i] for i in reservation.indices])
                lease.wait(1)
                check_bytes(lease, blocks)
        case 8:
            store.prefetch(blocks)
        case 9:
            store.probe(blocks)
            store.explain(blocks)
        case 10:
            store.retain(blocks, Retention(random.choice([20, 35, 50]), ttl_s=0.1))
        case 11:
            if not random.randrange(4):
                store.evict(blocks)


def enter(store: Store, random: Random, state: str) -> None:
    """Get into a state and stay there, as far as it can be stayed in."""
    blocks = prompt(random.randrange(PROMPTS))
    mine = chain(BLOCKS, seed=1_000)  # which nobody ever commits
    if state in ("reserved", "half-written"):
        reservation = store.reserve(mine)
        if state == "half-written":
            for view in reservation.views[: len(reservation) // 2]:
                view[:] = b"\xee" * len(view)
    elif state in ("leased", "filling"):
        put(store, blocks)
        leases = [store.acquire(blocks), store.acquire(prompt(random.randrange(PROMPTS)))]
        if state == "leased":
            for lease in leases:
                lease.wait()
                lease.views  # noqa: B018
    say(state)
    while state == "working":
        work(store, random)
    signal.pause()


def say(text: str) -> None:
    os.write(1, (text + "\n").encode())


def child(url: str, seed: str, operations: str, state: str) -> None:
    """Carry out one line, and end the process."""
    status = 1
    try:
        random = Random(int(seed))
        with connect(url) as store:
            for _ in range(int(operations)):
                work(store, random)
            if state in STATES:
                enter(store, random, state)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def serve(run: Callable[..., None]) -> None:
    """Fork a child for each line; say its number, and when it has ended."""
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            run(*line.split())
        say(f"pid {pid}")
        _, status = os.waitpid(pid, 0)
        say(f"ended {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    content(b"warm")
    serve(child)

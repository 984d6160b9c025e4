"""What the store's tests are made with: real tiers, some of them behind a gate."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kvstore.errors import TierError
from kvstore.hashing import Chain, Key, TokenChain
from kvstore.hub import Bounds
from kvstore.identity import Namespace
from kvstore.retention import Retention
from kvstore.store import BlockStore
from kvstore.tier import LocalTier, ReadRequest, ReadResult, WriteItem, WriteResult
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.ram import RamTier
from kvstore.verbs import Lease, Store

T = TypeVar("T")

NAMESPACE = Namespace("tiny", "weights", "tokenizer", "float16", 1, 2, 64, 16, "rope")
BLOCK = NAMESPACE.layout.block_bytes  # 8 KiB
NVME_BYTES = 8 << 20
ROUND_TRIPS = 1000  # for what another thread is about to do
LOOK_S = 0.01
PATIENCE_S = 30.0  # for what comes within milliseconds, or is broken


def chain(blocks: int, seed: int = 0, namespace: Namespace = NAMESPACE) -> Chain:
    """The first `blocks` blocks of prompt number `seed`."""
    tokens = random.Random(seed).choices(range(50_000), k=blocks * namespace.block_tokens)
    return TokenChain(namespace, tokens).chain()


def content(key: Key, nbytes: int = BLOCK) -> bytes:
    """The bytes that belong under a key, the same on every run."""
    return random.Random(key).randbytes(nbytes)


def put(store: Store, blocks: Chain, retention: Retention | None = None) -> int:
    """Reserve, fill, commit; returns how many blocks this was the first to commit."""
    with store.reserve(blocks, retention=retention) as reservation:
        fill(reservation.views, [blocks.keys[i] for i in reservation.indices])
        return reservation.commit()


def fill(views: Sequence[memoryview], keys: Sequence[Key]) -> None:
    for view, key in zip(views, keys, strict=True):
        view[:] = content(key, len(view))


def get(store: Store, blocks: Chain, **options: Any) -> int:
    """Acquire, wait, compare every byte, release; returns how many blocks were served."""
    with store.acquire(blocks, **options) as lease:
        lease.wait()
        return check_bytes(lease, blocks)


def check_bytes(lease: Lease, blocks: Chain) -> int:
    """Compare what is ready with what belongs there; returns how many blocks that were."""
    views = lease.views
    for view, key in zip(views, blocks.keys, strict=False):
        assert view.readonly
        assert bytes(view) == content(key, len(view))
    return len(views)


class FakeClock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def wall_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.now_s


class RunningClock(FakeClock):
    """Time that passes by itself, and as much more as the test says."""

    def wall_s(self) -> float:
        return self.now_s + time.monotonic()

    def monotonic_s(self) -> float:
        return self.now_s + time.monotonic()


class GatedTier:
    """A real tier, with a gate and a switch in front of each verb that does I/O.

    While a verb is held its calls wait, and `arrived` tells of them; while it
    is broken they raise. `calls` counts them, `read_keys` every block asked for.
    """

    def __init__(self, tier: LocalTier) -> None:
        self._tier = tier
        self._held: set[str] = set()
        self._broken: set[str] = set()
        self._arrivals: dict[str, threading.Semaphore] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opened = asyncio.Event()
        self.calls: Counter[str] = Counter()
        self.read_keys: Counter[Key] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tier, name)

    # ---- for the test

    def hold(self, *verbs: str) -> None:
        self._held.update(verbs)

    def release(self, *verbs: str) -> None:
        """Let the calls of these verbs (default: of all) go on."""
        self._held.difference_update(verbs or set(self._held))
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._opened.set)

    def break_(self, *verbs: str) -> None:
        self._broken.update(verbs)

    def mend(self) -> None:
        self._broken.clear()

    def arrived(self, verb: str) -> None:
        """Block until another call of `verb` has come to the gate."""
        assert self._arrival(verb).acquire(timeout=PATIENCE_S), f"nobody called {verb}"

    # ---- the verbs

    async def read(self, items: Sequence[ReadRequest]) -> list[ReadResult]:
        self.read_keys.update(item.key for item in items)
        await self._pass("read")
        return await self._tier.read(items)

    async def write(self, items: Sequence[WriteItem]) -> list[WriteResult]:
        await self._pass("write")
        return await self._tier.write(items)

    async def delete(self, keys: Sequence[Key]) -> int:
        await self._pass("delete")
        return await self._tier.delete(keys)

    async def remember(self, namespaces: Sequence[Namespace]) -> None:
        await self._pass("remember")
        await self._tier.remember(namespaces)

    async def retain(self, keys: Sequence[Key], priority: int, expires_s: float) -> int:
        await self._pass("retain")
        return await self._tier.retain(keys, priority, expires_s)

    async def close(self) -> None:
        await self._tier.close()

    def _arrival(self, verb: str) -> threading.Semaphore:
        return self._arrivals.setdefault(verb, threading.Semaphore(0))

    async def _pass(self, verb: str) -> None:
        self._loop = asyncio.get_running_loop()
        self.calls[verb] += 1
        self._arrival(verb).release()
        while verb in self._held:
            self._opened.clear()
            await self._opened.wait()
        if verb in self._broken:
            raise TierError(f"{verb} is broken")


class Rig:
    """A store over real tiers, and everything that a test wants to reach behind its back."""

    def __init__(
        self,
        path: Path | None,
        *,
        ram_blocks: int = 64,
        nvme_bytes: int = NVME_BYTES,
        wrap: Callable[[LocalTier], LocalTier] | None = None,
        clock: FakeClock | None = None,
        **bounds: Any,
    ) -> None:
        """Without a path there is no NVMe. `wrap` goes between the gate and the tier."""
        self.path = path
        self.clock = clock or FakeClock()
        self.ram = RamTier(ram_blocks * BLOCK)
        self.gate: Any = None
        if path is not None:
            nvme: LocalTier = NvmeTier(path, nvme_bytes, driver="threads", now_s=self.clock.wall_s)
            self.nvme = nvme
            self.gate = GatedTier(wrap(nvme) if wrap is not None else nvme)
        self.store = BlockStore(self.ram, self.gate, bounds=Bounds(**bounds), clock=self.clock)

    @property
    def hub(self) -> Any:
        return self.store._hub

    @property
    def below(self) -> Any:
        return self.store._below

    def counter(self, name: str) -> int:
        return self.store.stats().counters.get(name, 0)

    def column(self, name: str, blocks: Chain) -> list[Any]:
        """A column of RAM's index for blocks that are resident."""
        index = self.ram.slots.index
        return [getattr(index, name).item(index.rows_by_key[key]) for key in blocks]

    def drop_from_ram(self, blocks: Chain) -> None:
        """As pressure would: nothing below is told."""
        with self.hub.lock:
            rows = [row for row in self.ram.slots.find(blocks.keys) if row is not None]
            array = np.array(rows, dtype=np.int64)
            self.ram.slots.evict(array)
            self.ram.slots.free(array)

    def store_below(self, blocks: Chain, retention: Retention | None = None) -> None:
        """Put blocks on NVMe, and not in RAM."""
        put(self.store, blocks, retention)
        assert self.store.flush(PATIENCE_S)
        self.drop_from_ram(blocks)
        assert set(self.store.probe(blocks).tiers) == {"nvme"}

    def until(self, condition: Callable[[], bool]) -> None:
        """Block until `condition` holds, looking whenever the store says that something changed.

        And in between, because it does not say that a lease has been released.
        """
        hub = self.hub
        given_up_s = time.monotonic() + PATIENCE_S
        with hub.lock:
            while not hub.changed.wait_for(condition, LOOK_S):
                assert time.monotonic() < given_up_s

    def run_in_background(self, work: Coroutine[Any, Any, T]) -> T:
        """What the coroutine returns, run where the store moves its bytes."""
        return self.store._loop.spawn(work).result(PATIENCE_S)

    def is_quiet(self) -> bool:
        """Whether nothing is pinned and nothing moves. Lock held."""
        pinned = bool(self.ram.slots.index.pins.any())
        return not pinned and (self.below is None or self.below.idle)

    def finish(self) -> None:
        """End as every test should: nothing pinned or contradictory, everything given back."""
        try:
            if self.gate is not None:
                self.gate.release()
            if not self.hub.closed:
                self.hub.settle_orphans()
                self.until(self.is_quiet)
                self.store.check_invariants()
        finally:
            self.store.close()


def stats_add_up(store: Store, asked_blocks: int) -> None:
    """asked = hits + misses, exactly; a lease over a wire counts once its last byte has left."""
    for _ in range(ROUND_TRIPS):
        stats = store.stats()
        counted_blocks = sum(stats.hits.values()) + sum(stats.misses.values())
        if counted_blocks == asked_blocks:
            return
    raise AssertionError(f"{counted_blocks} of {asked_blocks} blocks are accounted for: {stats}")


def used(counter: Mapping[str, int]) -> dict[str, int]:
    """A counter without its zeros."""
    return {name: count for name, count in counter.items() if count}

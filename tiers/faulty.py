"""A tier that fails as told: to see what a set-up does when a drive or a network misbehaves.

All faults come from one seeded generator, so a run can be had again. What a
fault does is what a sound tier makes of it: torn or flipped bytes are found by
their checksum and missed, with whatever was read left in the caller's buffer.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import SettingsError, TierError
from kvstore.hashing import Key
from kvstore.histogram import Distribution
from kvstore.identity import Namespace
from kvstore.slots import SlotTable, Usage
from kvstore.tier import (
    Checked,
    LocalTier,
    Miss,
    ReadRequest,
    ReadResult,
    Refusal,
    Tier,
    WriteItem,
    WriteResult,
)

Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class Faults:
    """What goes wrong, and how often. Rates are probabilities from 0 to 1."""

    seed: int = 0
    latency_s: float = 0.0  # mean of an exponential distribution, before each read and write
    error_rate: float = 0.0  # of verbs: the tier fails as a whole
    torn_write_rate: float = 0.0  # of blocks written: only a part arrives, unnoticed
    bit_flip_rate: float = 0.0  # of blocks read: one bit is not what was written
    disk_bytes: int | None = None  # blocks are refused when this much has been written

    def __post_init__(self) -> None:
        rates = (self.error_rate, self.torn_write_rate, self.bit_flip_rate)
        if not all(0.0 <= rate <= 1.0 for rate in rates):
            raise SettingsError("fault rates are probabilities, from 0 to 1")
        if self.latency_s < 0 or (self.disk_bytes or 0) < 0:
            raise SettingsError("neither latency nor disk size of a faulty tier can be negative")


class FaultyTier:
    """Any tier, and the faults in front of it. Closing it closes the tier within."""

    def __init__(self, tier: Tier, faults: Faults, sleep: Sleep = asyncio.sleep) -> None:
        """`sleep` is what waits for the latency: a simulation gives that of its own clock."""
        self._tier = tier
        self._faults = faults
        self._sleep = sleep
        self._random = random.Random(faults.seed)
        self._torn: dict[Key, int] = {}  # blocks of which only so many bytes arrived
        self._written_bytes = 0
        self.injected: Counter[str] = Counter()

    @property
    def name(self) -> str:
        return self._tier.name

    async def contains(self, keys: Sequence[Key]) -> list[bool]:
        self._may_fail("contains")
        return await self._tier.contains(keys)

    async def read(self, items: Sequence[ReadRequest]) -> list[ReadResult]:
        await self._wait()
        self._may_fail("read")
        results = await self._tier.read(items)
        damaged: list[Key] = []
        for place, (item, result) in enumerate(zip(items, results, strict=True)):
            if result.miss is None and self._damage(item):
                results[place] = ReadResult(None, Miss.CHECKSUM)
                damaged.append(item.key)
        if damaged:
            await self._tier.delete(damaged)
        return results

    async def write(self, items: Sequence[WriteItem]) -> list[WriteResult]:
        await self._wait()
        self._may_fail("write")
        results: list[WriteResult | None] = [None] * len(items)
        taken: list[int] = []
        for place, item in enumerate(items):
            if self._is_full(item.record.raw_bytes):
                results[place] = WriteResult(Refusal.IO_ERROR)
            else:
                taken.append(place)
        written = await self._tier.write([items[place] for place in taken])
        for place, result in zip(taken, written, strict=True):
            results[place] = result
            if result.refusal is None:
                self._may_tear(items[place])
        return [result or WriteResult(Refusal.IO_ERROR) for result in results]

    async def delete(self, keys: Sequence[Key]) -> int:
        self._may_fail("delete")
        for key in keys:
            self._torn.pop(key, None)
        return await self._tier.delete(keys)

    async def close(self) -> None:
        await self._tier.close()

    async def _wait(self) -> None:
        if self._faults.latency_s:
            await self._sleep(self._random.expovariate(1 / self._faults.latency_s))

    def _hits(self, rate: float) -> bool:
        return rate > 0 and self._random.random() < rate

    def _may_fail(self, verb: str) -> None:
        if self._hits(self._faults.error_rate):
            self.injected["errors"] += 1
            raise TierError(f"{self.name}: {verb} failed (injected)")

    def _is_full(self, nbytes: int) -> bool:
        limit = self._faults.disk_bytes
        if limit is not None and self._written_bytes + nbytes > limit:
            self.injected["disk_full"] += 1
            return True
        self._written_bytes += nbytes
        return False

    def _may_tear(self, item: WriteItem) -> None:
        if self._hits(self._faults.torn_write_rate):
            self.injected["torn_writes"] += 1
            self._torn[item.record.key] = self._random.randrange(item.record.raw_bytes)

    def _damage(self, item: ReadRequest) -> bool:
        """Spoil the bytes that were read, if it is this block's turn."""
        data = item.buffer.cast("B")
        arrived = self._torn.pop(item.key, None)
        if arrived is not None:
            data[arrived : item.raw_bytes] = bytes(item.raw_bytes - arrived)
            return True
        if self._hits(self._faults.bit_flip_rate):
            self.injected["bit_flips"] += 1
            data[self._random.randrange(item.raw_bytes)] ^= 1 << self._random.randrange(8)
            return True
        return False


class FaultyLocalTier(FaultyTier):
    """The same for a tier of this machine; what is known without I/O stays true."""

    def __init__(self, tier: LocalTier, faults: Faults, sleep: Sleep = asyncio.sleep) -> None:
        super().__init__(tier, faults, sleep)
        self._local = tier

    @property
    def slots(self) -> SlotTable:
        return self._local.slots

    @property
    def lock(self) -> threading.Lock:
        return self._local.lock

    def peek(self, keys: Sequence[Key]) -> list[bool]:
        return self._local.peek(keys)

    def was_evicted(self, key: Key) -> bool:
        return self._local.was_evicted(key)

    def namespaces(self) -> Mapping[bytes, Namespace]:
        return self._local.namespaces()

    async def remember(self, namespaces: Sequence[Namespace]) -> None:
        self._may_fail("remember")
        await self._local.remember(namespaces)

    def touch(self, keys: Sequence[Key]) -> None:
        self._local.touch(keys)

    def protected_bytes(self, namespace: bytes) -> int:
        return self._local.protected_bytes(namespace)

    async def retain(self, keys: Sequence[Key], priority: int, expires_s: float) -> int:
        self._may_fail("retain")
        return await self._local.retain(keys, priority, expires_s)

    def page(self, start: int, stop: int) -> tuple[NDArray[np.void], int]:
        return self._local.page(start, stop)

    def check(self, keys: Sequence[Key]) -> Checked:
        self._may_fail("check")
        return self._local.check(keys)

    def stats(self) -> Mapping[str, int]:
        return {
            **self._local.stats(),
            **{f"injected_{name}": count for name, count in self.injected.items()},
        }

    def usage(self) -> Mapping[bytes, Usage]:
        return self._local.usage()

    def eviction_age_s(self) -> Distribution:
        return self._local.eviction_age_s()

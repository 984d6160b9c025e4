"""What a tier is: a place that holds blocks, behind five batch verbs.

The caller owns every buffer. A tier never keeps a view after its verb has
returned. One block that cannot be read or written is a result, not an
exception: a batch is never lost to its worst member.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore.hashing import Key
from kvstore.histogram import Distribution
from kvstore.identity import Namespace
from kvstore.slots import SlotTable, Usage


class Miss(enum.Enum):
    """Why a block was not served. Every miss has exactly one reason."""

    ABSENT = "absent"
    EVICTED = "evicted"
    IDENTITY = "identity"
    CHECKSUM = "checksum"
    DEADLINE = "deadline"
    BREAKER = "breaker"
    TOO_SLOW = "too_slow"


class Refusal(enum.Enum):
    """Why a tier did not take a block. Nothing is lost: the block stays where it was."""

    FULL = "full"  # no room, and nothing there has a lesser claim
    ADMISSION = "admission"  # the admission rule says that it is not worth the write
    BUDGET = "budget"  # the write budget of the day is used up
    IO_ERROR = "io_error"  # the medium refused (ENOSPC, EIO, ...)
    READ_ONLY = "read_only"  # the tier has turned itself read-only or off
    INVALID = "invalid"  # record and buffer do not fit each other


@dataclass(frozen=True, slots=True)
class Record:
    """What a tier knows of one stored block; written with it, compared before it is read.

    `checksum` is xxh3_64 over the `stored_bytes` that follow the codec, or None
    while the block has not yet left RAM: the tier that stores it fills it in.
    Times are seconds since the epoch; `expires_s` is when `priority` falls back
    to the default (0.0: never).
    """

    namespace: bytes
    key: Key
    parent: Key
    raw_bytes: int
    shard_start: int = 0  # first KV head held
    shard_heads: int = 0  # number of KV heads held; 0 means all of them
    codec: str = "raw"
    stored_bytes: int = 0
    checksum: int | None = None
    created_s: float = 0.0
    last_use_s: float = 0.0
    priority: int = 35
    expires_s: float = 0.0


class ReadRequest(NamedTuple):
    """One block to read: `buffer` (writable, at least `raw_bytes` long) belongs to the caller."""

    key: Key
    namespace: bytes  # fingerprint that the stored record must carry
    raw_bytes: int  # length that the stored record must carry
    buffer: memoryview


class ReadResult(NamedTuple):
    """`record` and no `miss`, or the reason. After a miss the buffer's content is undefined."""

    record: Record | None
    miss: Miss | None


class WriteItem(NamedTuple):
    """One block to write: the first `record.raw_bytes` bytes of `buffer` (maybe longer)."""

    record: Record
    buffer: memoryview


class WriteResult(NamedTuple):
    """`refusal` is None when the block is stored (or was there already)."""

    refusal: Refusal | None


class Checked(NamedTuple):
    """What was read to be checked: the blocks found, their stored bytes, and the damaged ones."""

    blocks: int
    stored_bytes: int
    damaged: list[Key]


class Tier(Protocol):
    """Async, batch only, caller-owned buffers. Every tier passes one conformance suite.

    Results come in the order of the requests, one each. Verbs may be called
    from one event loop only, several at a time. After `close` every verb raises
    `ClosedError`; `close` may be called twice.
    """

    @property
    def name(self) -> str: ...

    async def contains(self, keys: Sequence[Key]) -> list[bool]: ...

    async def read(self, items: Sequence[ReadRequest]) -> list[ReadResult]: ...

    async def write(self, items: Sequence[WriteItem]) -> list[WriteResult]: ...

    async def delete(self, keys: Sequence[Key]) -> int: ...

    async def close(self) -> None: ...


class SharedArena(Protocol):
    """The memory of the RAM tier, for other processes to map."""

    @property
    def fd(self) -> int: ...

    @property
    def buffer(self) -> memoryview: ...

    def is_populated(self, stop: int) -> bool: ...

    def populate(self, stop: int) -> None: ...


class HubTier(Tier, Protocol):
    """The RAM tier as the store uses it: every transfer has one of its slots at one end.

    `slots` says which bytes of `buffer` are whose, and is touched only under
    `lock`, which is held for microseconds and never across I/O or an await.
    """

    @property
    def slots(self) -> SlotTable: ...

    @property
    def buffer(self) -> memoryview: ...

    @property
    def lock(self) -> threading.Lock: ...

    @property
    def arena(self) -> SharedArena: ...

    def populate(self, stop: int) -> None:
        """Bytes `[0, stop)` of `buffer` are about to be written. May be called from any thread."""
        ...


class LocalTier(Tier, Protocol):
    """A tier of this machine, whose metadata can be asked without I/O, from any thread.

    `slots` says what is held, and is touched only under `lock`.
    """

    @property
    def slots(self) -> SlotTable: ...

    @property
    def lock(self) -> threading.Lock: ...

    def peek(self, keys: Sequence[Key]) -> list[bool]:
        """Whether each key would be found now. Microseconds, no I/O, no side effect."""
        ...

    def was_evicted(self, key: Key) -> bool:
        """Whether `key` was held and then evicted (best effort, bounded memory)."""
        ...

    def namespaces(self) -> Mapping[bytes, Namespace]:
        """Every namespace that is remembered here, by fingerprint."""
        ...

    async def remember(self, namespaces: Sequence[Namespace]) -> None:
        """Keep the full records of these namespaces beside the blocks.

        Raises TierFullError where there is no room for more of them.
        """
        ...

    def touch(self, keys: Sequence[Key]) -> None:
        """These blocks were used, here or in a warmer tier. No I/O; unknown keys are ignored."""
        ...

    def protected_bytes(self, namespace: bytes) -> int:
        """Bytes of this namespace that stand above the default priority. No I/O."""
        ...

    async def retain(self, keys: Sequence[Key], priority: int, expires_s: float) -> int:
        """Set priority and expiry of the blocks held here; returns how many were."""
        ...

    def stats(self) -> Mapping[str, int]:
        """Counters and gauges, by name; units are the last word of the name."""
        ...

    def page(self, start: int, stop: int) -> tuple[NDArray[np.void], int]:
        """What rows `[start, stop)` of the table hold, and how many rows there are.

        [n] of `frame.RECORD_DTYPE`, a copy; its seals mean nothing. No I/O.
        """
        ...

    def check(self, keys: Sequence[Key]) -> Checked:
        """Compare checksums of blocks, wherever they are; the damaged are dropped.

        Changes nothing else, not even the order of use. Blocks while it reads.
        """
        ...

    def usage(self) -> Mapping[bytes, Usage]:
        """Blocks and bytes held of each namespace, by fingerprint. No I/O."""
        ...

    def eviction_age_s(self) -> Distribution:
        """How long blocks had not been used when they had to make room."""
        ...

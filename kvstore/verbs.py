"""What a store is: the verbs of `BlockStore` in this process and `StoreClient` over a daemon.

Everything takes a chain of keys; there is no verb for a single block. No verb waits for
I/O: what takes time is waited for in the lease, or with `flush`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from kvstore.answers import Explanation, Probe, Stats
from kvstore.hashing import Chain
from kvstore.planner import LinearCost
from kvstore.retention import Retained, Retention
from kvstore.tier import Miss


class Lease(Protocol):
    """The longest present prefix of a chain, pinned until `release`; blocks become ready in order.

    It ends early where a block does not come: `len` is then less, and `miss` says why.
    Safe to use from several threads.
    """

    def __len__(self) -> int: ...

    @property
    def miss(self) -> Miss | None:
        """Why the block after the last one is not served; None if the whole chain is."""
        ...

    @property
    def sources(self) -> list[str]:
        """For each block the tier it comes from: "ram", "nvme" or "remote"."""
        ...

    def ready(self) -> int:
        """How many leading blocks can be read now. Does not wait."""
        ...

    def wait(self, n: int | None = None, timeout_s: float | None = None) -> int:
        """Block until `n` (default: all) leading blocks are ready, or the lease ends before."""
        ...

    def __await__(self) -> Generator[Any, None, int]: ...

    @property
    def views(self) -> Sequence[memoryview]:
        """Read-only bytes of the ready blocks, canonical layout; not to be touched after release.

        Raises ClosedError after that.
        """
        ...

    def release(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Reservation(Protocol):
    """Writable slots for blocks of a chain, unseen until `commit`. Belongs to one thread."""

    @property
    def indices(self) -> Sequence[int]:
        """Which blocks of the chain the slots are for."""
        ...

    def __len__(self) -> int: ...

    @property
    def views(self) -> Sequence[memoryview]:
        """Writable bytes of each slot, canonical layout; not to be touched after `commit`."""
        ...

    def commit(self) -> int:
        """Make the blocks visible; returns how many this writer was the first to commit."""
        ...

    def abort(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Store(Protocol):
    """Every verb is safe from any thread. After `close` every verb raises ClosedError."""

    def probe(self, chain: Chain) -> Probe: ...

    def acquire(self, chain: Chain, *, deadline_s: float | None = None) -> Lease: ...

    def reserve(self, chain: Chain, *, retention: Retention | None = None) -> Reservation: ...

    def prefetch(self, chain: Chain) -> int: ...

    def retain(self, chain: Chain, retention: Retention) -> Retained: ...

    def evict(self, chain: Chain) -> int: ...

    def explain(self, chain: Chain) -> Explanation: ...

    def stats(self) -> Stats: ...

    @property
    def load_costs(self) -> Mapping[str, LinearCost]: ...

    def queued_bytes(self) -> Mapping[str, int]: ...

    def memory(self) -> memoryview | None:
        """What all views are parts of, for those who pin it; None where it is not one piece.

        Blocks until it is there as a whole, for seconds where it is large.
        """
        ...

    def flush(self, timeout_s: float | None = None) -> bool: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

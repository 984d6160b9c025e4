"""From a store to an archive: every block read once, each after the one that it follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvstore.archive.file import ArchiveWriter
from kvstore.chains import walk
from kvstore.errors import TierError
from kvstore.frame import checksum, names
from kvstore.hashing import Chain, Key
from kvstore.identity import Namespace
from kvstore.tier import Miss, Record
from kvstore.verbs import Lease, Store

BATCH_BLOCKS, BATCH_BYTES = 1024, 32 << 20  # leased at once; always at least one block
DEADLINE_S = 60.0  # for one batch to come from the drive
ATTEMPTS = 3  # at a block that is there, but does not come in time

Report = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclass
class Saved:
    """What became of the blocks that were to be saved."""

    blocks: int = 0
    nbytes: int = 0
    missed: dict[str, int] = field(default_factory=dict)  # listed, but not served: by reason


def save(
    store: Store,
    namespaces: Mapping[bytes, Namespace],
    rows: NDArray[np.void],
    writer: ArchiveWriter,
    report: Report,
) -> Saved:
    """Write the blocks of `rows` (of `frame.RECORD_DTYPE`), whose namespaces are all known.

    Blocks for as long as it takes. Raises TierError where the store does not serve any more.
    """
    saved = Saved()
    total = int(rows["raw_bytes"].sum())
    for fingerprint in sorted(set(names(rows["namespace"]))):
        namespace = namespaces[fingerprint]
        writer.namespace(namespace)
        mine = rows[rows["namespace"] == np.void(fingerprint)]
        known = dict(zip(names(mine["key"]), mine, strict=True))
        for chain in _batches(namespace, known):
            for lease, part in _leases(store, chain, saved):
                _write(writer, lease, part, known)
            saved.blocks, saved.nbytes = writer.blocks, writer.nbytes
            report(saved.nbytes, total)
    writer.end()
    return saved


def _batches(namespace: Namespace, known: Mapping[Key, Any]) -> Iterator[Chain]:
    """The blocks, ancestors first. A store does not mind that they are not all of one prompt."""
    parents = {key: row["parent"].item() for key, row in known.items()}
    room = max(1, min(BATCH_BLOCKS, BATCH_BYTES // namespace.layout.block_bytes))
    keys = [place.key for place in walk(parents)]
    for start in range(0, len(keys), room):
        batch = tuple(keys[start : start + room])
        yield Chain(namespace, parents[batch[0]], batch)


def _leases(store: Store, chain: Chain, saved: Saved) -> Iterator[tuple[Lease, Chain]]:
    """Leases over all of a chain's blocks that are served, and what of the chain each is over."""
    attempts = 0
    while len(chain):
        with store.acquire(chain, deadline_s=DEADLINE_S) as lease:
            ready = lease.wait()
            miss = lease.miss
            if ready:
                yield lease, chain.slice(0, ready)
        chain = chain.slice(ready)
        if not len(chain):
            return
        if miss is Miss.BREAKER:
            raise TierError("the store does not answer any more; nothing was written")
        attempts = 0 if ready else attempts + 1
        # It may just have been too much at once; but what has gone is gone.
        if attempts < ATTEMPTS and miss in (None, Miss.TOO_SLOW, Miss.DEADLINE):
            continue
        reason = Miss.TOO_SLOW.value if miss is None else miss.value
        saved.missed[reason] = saved.missed.get(reason, 0) + 1
        chain, attempts = chain.slice(1), 0


def _write(writer: ArchiveWriter, lease: Lease, chain: Chain, known: Mapping[Key, Any]) -> None:
    for key, view in zip(chain, lease.views, strict=True):
        row = known[key]
        writer.block(
            Record(
                namespace=chain.namespace.fingerprint,
                key=key,
                parent=row["parent"].item(),
                raw_bytes=view.nbytes,
                stored_bytes=view.nbytes,
                checksum=checksum(view),
                created_s=float(row["created_s"]),
                last_use_s=float(row["last_use_s"]),
                priority=int(row["priority"]),
                expires_s=float(row["expires_s"]),
            ),
            view,
        )

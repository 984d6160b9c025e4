"""From an archive to a store: what is damaged is left out, and what is there is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from kvstore.archive.file import Block, Damage, End, Entry
from kvstore.hashing import Chain, Key
from kvstore.identity import Namespace
from kvstore.retention import DEFAULT_PRIORITY, Retention
from kvstore.tier import Record
from kvstore.verbs import Store

BATCH_BLOCKS, BATCH_BYTES = 1024, 32 << 20  # in memory at once; always at least one block

Report = Callable[[int], None]  # bytes of the file done


@dataclass
class Restored:
    """What became of the blocks of an archive."""

    blocks: int = 0  # new to the store
    present: int = 0  # in the store before
    refused: int = 0  # the store had no room for them
    evicted: int = 0  # of `blocks` and `present`: had to make room for others of the same file
    damage: list[Damage] = field(default_factory=list)
    promised: int | None = None  # blocks that the file should have held; None: it was cut off
    keys: list[Key] = field(default_factory=list)  # of all sound blocks

    @property
    def is_whole(self) -> bool:
        """Whether the file was read to its end, and nothing in it was damaged."""
        return not self.damage and self.promised is not None

    @property
    def lost(self) -> int | None:
        """Blocks that could not be read; None where nobody can tell."""
        found = self.blocks + self.present + self.refused
        return None if self.promised is None else max(0, self.promised - found)


def restore(store: Store, entries: Iterator[Entry], now_s: float, report: Report) -> Restored:
    """Put the blocks of an archive (`file.read`) into the store, as firmly kept as they were.

    Blocks for as long as it takes, the lower tier's writes included. `now_s` is seconds
    since the epoch: a TTL goes on from there.
    """
    restored = Restored()
    known: dict[bytes, Namespace] = {}
    batch: list[Block] = []
    chains: list[Chain] = []
    for entry in entries:
        if isinstance(entry, Namespace):
            known[entry.fingerprint] = entry
        elif isinstance(entry, Damage):
            restored.damage.append(entry)
        elif isinstance(entry, End):
            restored.promised = entry.blocks
        else:
            report(entry.start)
            problem = _unusable(entry.record, known.get(entry.record.namespace))
            if problem:
                restored.damage.append(Damage(entry.start, problem))
                continue
            if batch and not _belongs(batch, entry):
                chains.append(_put(store, known, batch, now_s, restored))
                batch = []
            batch.append(entry)
    if batch:
        chains.append(_put(store, known, batch, now_s, restored))
    store.flush()
    restored.keys = [key for chain in chains for key in chain]
    missing = sum(store.probe(chain).tiers.count(None) for chain in chains)
    restored.evicted = max(0, missing - restored.refused)
    return restored


def _unusable(record: Record, namespace: Namespace | None) -> str:
    """Why a sound block can be of no use; "" when it can."""
    if namespace is None:
        return "the record of the block's namespace is not there"
    whole = record.shard_start == 0 and record.shard_heads in (0, namespace.kv_heads)
    if record.codec != "raw" or not whole or record.raw_bytes != record.stored_bytes:
        return "the block is not in the form that an archive has"
    if record.raw_bytes != namespace.layout.block_bytes:
        return f"a block of {record.raw_bytes} bytes, not {namespace.layout.block_bytes}"
    return ""


def _belongs(batch: list[Block], block: Block) -> bool:
    """Whether the block follows the last one in its prompt, and is to be kept like it."""
    last, record = batch[-1].record, block.record
    return (
        record.parent == last.key
        and record.namespace == last.namespace
        and (record.priority, record.expires_s) == (last.priority, last.expires_s)
        and len(batch) < BATCH_BLOCKS
        and sum(len(each.stored) for each in batch) + len(block.stored) <= BATCH_BYTES
    )


def _put(
    store: Store,
    known: dict[bytes, Namespace],
    batch: list[Block],
    now_s: float,
    restored: Restored,
) -> Chain:
    """Returns the blocks as a chain."""
    first = batch[0].record
    keys = tuple(block.record.key for block in batch)
    chain = Chain(known[first.namespace], first.parent, keys)
    retention = _retention(first, now_s)
    absent = store.probe(chain).tiers.count(None)
    if absent and _fill(store, chain, batch, retention):
        store.flush()  # RAM may be full of what has yet to be written
        _fill(store, chain, batch, retention)
    refused = store.probe(chain).tiers.count(None)
    restored.present += len(chain) - absent
    restored.blocks += max(0, absent - refused)
    restored.refused += refused
    return chain


def _fill(store: Store, chain: Chain, batch: list[Block], retention: Retention) -> int:
    """Put in what the store does not have; returns how many it had no room for."""
    refused = 0
    absent = [tier is None for tier in store.probe(chain).tiers]
    for start, stop in _runs(absent):
        with store.reserve(chain.slice(start, stop), retention=retention) as reservation:
            for place, view in zip(reservation.indices, reservation.views, strict=True):
                view[:] = batch[start + place].stored
            refused += stop - start - len(reservation)
            reservation.commit()
    return refused


def _retention(record: Record, now_s: float) -> Retention:
    """What is left of a block's claim. One that is over, or ends now, is the default's."""
    if not record.expires_s:
        return Retention(record.priority)
    left_s = record.expires_s - now_s
    return Retention(record.priority, left_s) if left_s > 0 else Retention(DEFAULT_PRIORITY)


def _runs(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """Where stretches of True begin and end."""
    start = 0
    for flag, group in groupby(flags):
        stop = start + sum(1 for _ in group)
        if flag:
            yield start, stop
        start = stop

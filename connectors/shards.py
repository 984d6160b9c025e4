"""Which shards of a block are there: how readers and writers of other TP sizes find each other.

A writer stores the heads it holds under keys of their own (`Chain.for_shard`) and leaves no
word of how many ranks there were. A reader asks for what it wants as it is; then for every
even way in which engines share heads out, fewest shards first, until one has the next block.
"""

from __future__ import annotations

from typing import NamedTuple

from kvstore.answers import RAM
from kvstore.hashing import Chain
from kvstore.layout import BlockLayout, Shard
from kvstore.verbs import Store


class Run(NamedTuple):
    """Blocks `[start, stop)` of a chain that are stored as `shards`, which hold all that is asked.

    `tiers[i]` is the tier of block `start + i`: of its shards the coldest.
    """

    shards: tuple[Shard, ...]
    start: int
    stop: int
    tiers: list[str]


def shardings(layout: BlockLayout, wanted: Shard) -> list[tuple[Shard, ...]]:
    """Sets of shards that may be stored and together hold `wanted`: itself, then the fewest.

    Of an even split over as many ranks as divide the heads, those shards that overlap.
    """
    found: list[tuple[Shard, ...]] = [(wanted,)]
    for ranks in range(1, layout.kv_heads + 1):
        if layout.kv_heads % ranks == 0:
            split = layout.shards(ranks)
            needed = tuple(s for s in split if s.start < wanted.stop and wanted.start < s.stop)
            if needed not in found:
                found.append(needed)
    return found


def find_runs(store: Store, chain: Chain, wanted: Shard, start: int = 0) -> list[Run]:
    """The longest run of blocks from `start` on that is stored, in whatever shards.

    Probes, and nothing else. A block that is not there costs one key for each sharding.
    """
    ways = shardings(chain.namespace.layout, wanted)
    runs: list[Run] = []
    at = start
    while at < len(chain):
        run = next((run for way in ways if (run := _held(store, chain, way, at))), None)
        if run is None:
            break
        runs.append(run)
        at = run.stop
    return runs


def leading(runs: list[Run], blocks: int) -> list[Run]:
    """The first `blocks` blocks of the runs."""
    kept = []
    for run in runs:
        stop = min(run.stop, runs[0].start + blocks)
        if run.start < stop:
            kept.append(run._replace(stop=stop, tiers=run.tiers[: stop - run.start]))
    return kept


def _held(store: Store, chain: Chain, shards: tuple[Shard, ...], start: int) -> Run | None:
    """The run that begins at `start` and has all of `shards`, if there is one."""
    first = chain.slice(start, start + 1)
    if not all(store.probe(first.for_shard(shard)).prefix for shard in shards):
        return None
    tiers: list[str] = []
    stop = len(chain)
    for shard in shards:
        probe = store.probe(chain.slice(start, stop).for_shard(shard))
        stop = start + probe.prefix
        held = [tier for tier in probe.tiers[: probe.prefix] if tier is not None]
        tiers = [
            above if tier == RAM else tier for above, tier in zip(tiers or held, held, strict=False)
        ]
    return Run(shards, start, stop, tiers) if stop > start else None

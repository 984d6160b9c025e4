"""Events as vLLM publishes its own: the messages of `vllm.distributed.kv_events`, 0.32 and 0.33.

A batch is a msgpack array, an event in it a map with its type under "type". What stands at
its default is left out, from the end of an array and anywhere in a map; so is the one field
that 0.33 has beyond those of 0.32, `lookahead_token_ids`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from kvstore.answers import NVME, RAM
from kvstore.events import Cleared, Event, Removed, Stored, runs
from kvstore.hashing import Key
from kvstore.identity import Namespace

MEDIA = {RAM: "CPU", NVME: "STORAGE"}
RUN_BLOCKS = 4096  # of one message; a longer run goes on in the next

_Known = Callable[[bytes], Namespace | None]


class BlockStored(msgspec.Struct, tag=True, omit_defaults=True, gc=False):
    """A run of consecutive blocks."""

    block_hashes: list[bytes]
    parent_block_hash: bytes | None  # None at the start of a prompt
    token_ids: list[int]  # empty: the store knows hashes, not tokens
    block_size: int  # tokens in a block
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True, gc=False):
    """Blocks of one medium, in any order."""

    block_hashes: list[bytes]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, omit_defaults=True, gc=False):
    """No block is held any more, on any medium."""


KVCacheEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """`ts` is seconds since the epoch. Rank 0 is what vLLM says where there is but one."""

    ts: float
    events: list[KVCacheEvent]
    data_parallel_rank: int | None = None


def translate(events: Iterable[Event], known: _Known) -> Iterator[KVCacheEvent]:
    """The same in vLLM's words. `known` tells a namespace by its fingerprint."""
    for event in events:
        if isinstance(event, Stored):
            yield from _stored(event, known(event.namespace))
        elif isinstance(event, Removed):
            yield BlockRemoved(list(event.keys), MEDIA[event.tier], locality="LOCAL")
        else:
            assert isinstance(event, Cleared)
            yield AllBlocksCleared()


def _stored(event: Stored, namespace: Namespace | None) -> Iterator[BlockStored]:
    parents: dict[Key, Key] = dict(zip(event.keys, event.parents, strict=True))
    for first, keys in runs(parents):
        for start in range(0, len(keys), RUN_BLOCKS):
            parent = keys[start - 1] if start else first
            yield BlockStored(
                block_hashes=keys[start : start + RUN_BLOCKS],
                parent_block_hash=None if parent == event.namespace else parent,
                token_ids=[],
                block_size=namespace.block_tokens if namespace is not None else 0,
                lora_id=None,
                medium=MEDIA[event.tier],
                lora_name=(namespace.adapter or None) if namespace is not None else None,
                locality="LOCAL",
            )

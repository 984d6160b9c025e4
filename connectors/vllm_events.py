"""What becomes of a store's blocks, as events among vLLM's own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVCacheEvent

from kvstore.answers import NVME, RAM
from kvstore.errors import FallenBehindError
from kvstore.events import Event, Removed, Snapshot, Stored, pieces, runs
from kvstore.feed import KEPT_BLOCKS, Feed
from kvstore.identity import Namespace

log = logging.getLogger("vllm.kvstore")

MEDIA = {RAM: "CPU", NVME: "STORAGE"}
PIECE_BLOCKS = 2048  # of a snapshot, told at once


class Events:
    """Those of a store of this process's own, from now on. A daemon publishes its own.

    What happens is what the store holds. Whether this vLLM would still find it is another matter.
    """

    def __init__(self, feed: Feed, model: Namespace) -> None:
        self._feed = feed
        self._model = model
        self._last_id = 0
        self._thread = ThreadPoolExecutor(1, "kvstore-events")
        self._snapshot: Future[Snapshot] | None = None
        self._pieces: Iterator[Stored] | None = None
        feed.start()

    def take(self) -> list[KVCacheEvent]:
        """What has happened since the last call. Hashes are kvstore's keys, not vLLM's.

        Who falls behind is told that all is gone, and then, bit by bit, what there is.
        """
        if self._snapshot is not None:
            self._begin_again()
        if self._pieces is not None:
            with suppress(StopIteration):
                return list(self._translated(next(self._pieces)))
            self._pieces = None
        if self._snapshot is not None:
            return []
        try:
            events = self._feed.read(self._last_id, KEPT_BLOCKS)
        except FallenBehindError as error:
            log.warning("kvstore: events were lost, beginning with what there is: %s", error)
            # It may take a second.
            self._snapshot = self._thread.submit(self._feed.snapshot)
            return [AllBlocksCleared()]
        found: list[KVCacheEvent] = []
        for number, event in events:
            self._last_id = number
            found += self._translated(event)
        return found

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin_again(self) -> None:
        """When the snapshot is there, tell of it. Where so much happens that there is none, later.

        The number that was read last is then still too old, and another one is taken.
        """
        assert self._snapshot is not None
        if not self._snapshot.done():
            return
        with suppress(FallenBehindError):
            snapshot = self._snapshot.result()
            self._last_id = snapshot.last_id
            self._pieces = pieces(snapshot.contents, PIECE_BLOCKS)
        self._snapshot = None

    def _translated(self, event: Event) -> Iterator[KVCacheEvent]:
        if isinstance(event, Stored):
            yield from self._stored(event)
        elif isinstance(event, Removed):
            medium = MEDIA.get(event.tier, event.tier)
            yield BlockRemoved(block_hashes=list(event.keys), medium=medium)
        else:
            yield AllBlocksCleared()

    def _stored(self, event: Stored) -> Iterator[KVCacheEvent]:
        for first, keys in runs(dict(zip(event.keys, event.parents, strict=True))):
            yield BlockStored(
                block_hashes=list(keys),
                parent_block_hash=None if first == event.namespace else first,
                token_ids=[],  # the store knows hashes, not tokens
                block_size=self._model.block_tokens,
                lora_id=None,
                medium=MEDIA.get(event.tier, event.tier),
                lora_name=None,
            )

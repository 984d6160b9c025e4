"""What becomes of a store's blocks, as events among vLLM's own."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent

from kvstore.answers import NVME, RAM
from kvstore.errors import FallenBehindError
from kvstore.events import Removed, Stored, runs
from kvstore.feed import KEPT_BLOCKS, Feed
from kvstore.identity import Namespace

log = logging.getLogger("vllm.kvstore")

MEDIA = {RAM: "CPU", NVME: "STORAGE"}


class Events:
    """Those of a store of this process's own, from now on. A daemon publishes its own."""

    def __init__(self, feed: Feed, model: Namespace) -> None:
        self._feed = feed
        self._model = model
        self._last_id = 0
        feed.start()

    def take(self) -> Iterator[KVCacheEvent]:
        """What has happened since the last call. Hashes are kvstore's keys, not vLLM's."""
        try:
            events = self._feed.read(self._last_id, KEPT_BLOCKS)
        except FallenBehindError as error:
            log.warning("kvstore: events were lost: %s", error)
            self._last_id = self._feed.last_id
            return
        for number, event in events:
            self._last_id = number
            if isinstance(event, Stored):
                yield from self._stored(event)
            elif isinstance(event, Removed):
                yield BlockRemoved(block_hashes=list(event.keys), medium=MEDIA[event.tier])

    def _stored(self, event: Stored) -> Iterator[KVCacheEvent]:
        for first, keys in runs(dict(zip(event.keys, event.parents, strict=True))):
            yield BlockStored(
                block_hashes=list(keys),
                parent_block_hash=None if first == event.namespace else first,
                token_ids=[],  # the store knows hashes, not tokens
                block_size=self._model.block_tokens,
                lora_id=None,
                medium=MEDIA[event.tier],
                lora_name=None,
            )

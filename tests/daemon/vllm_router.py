"""A router that follows KV events as vLLM publishes them: what it would know of the blocks."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import zmq

from kvstore.hashing import Key
from tests.store.rig import PATIENCE_S

PATIENCE_MS = int(PATIENCE_S * 1000)
END = b"\xff" * 8


class Stored(msgspec.Struct, tag="BlockStored", forbid_unknown_fields=True):
    """`vllm.distributed.kv_events.BlockStored` of vLLM 0.32, field for field; 0.33 has one more."""

    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
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


class Removed(msgspec.Struct, tag="BlockRemoved", forbid_unknown_fields=True):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class Cleared(msgspec.Struct, tag="AllBlocksCleared", forbid_unknown_fields=True):
    pass


class Batch(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    ts: float
    events: list[Stored | Removed | Cleared]
    data_parallel_rank: int | None = None


class Router:
    """Subscribed when the constructor returns, but for what ZeroMQ has yet to set up."""

    def __init__(self, publish: str, replay: str | None = None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._subscriber = self._context.socket(zmq.SUB)
        self._subscriber.setsockopt(zmq.SUBSCRIBE, b"")
        self._subscriber.connect(publish)
        self._replay = replay
        self._next = 0
        self.held: defaultdict[str | None, dict[Key, Key | None]] = defaultdict(dict)
        self.batches: list[Batch] = []

    def hears(self, timeout_ms: int) -> bool:
        """Whether there is something to receive."""
        return bool(self._subscriber.poll(timeout_ms))

    def receive(self) -> None:
        """One batch, and before it those that were missed."""
        assert self.hears(PATIENCE_MS), "nothing is published"
        topic, number, payload = self._subscriber.recv_multipart()
        assert topic == b""
        if int.from_bytes(number) > self._next and self._replay is not None:
            for missed, replayed in self.replayed(self._next):
                if self._next <= missed < int.from_bytes(number):
                    self._take(missed, replayed)
        self._take(int.from_bytes(number), payload)

    def replayed(self, first: int) -> list[tuple[int, bytes]]:
        """What is sent again from number `first` on."""
        assert self._replay is not None
        found: list[tuple[int, bytes]] = []
        with self._context.socket(zmq.DEALER) as asking:
            asking.setsockopt(zmq.LINGER, 0)
            asking.connect(self._replay)
            asking.send_multipart([b"", first.to_bytes(8)])
            while True:
                assert asking.poll(PATIENCE_MS), "no replay"
                empty, topic, number, payload = asking.recv_multipart()
                assert (empty, topic) == (b"", b"")
                if number == END:
                    assert payload == b""
                    return found
                found.append((int.from_bytes(number), payload))

    def _take(self, number: int, payload: bytes) -> None:
        assert number == self._next
        self._next += 1
        batch = msgspec.msgpack.decode(payload, type=Batch)
        self.batches.append(batch)
        for event in batch.events:
            if isinstance(event, Cleared):
                self.held.clear()
                continue
            held = self.held[event.medium]
            if isinstance(event, Removed):
                for key in event.block_hashes:
                    assert isinstance(key, bytes)
                    del held[key]
                continue
            parent = event.parent_block_hash
            for key in event.block_hashes:
                assert isinstance(key, bytes)
                assert parent is None or isinstance(parent, bytes)
                assert key not in held
                held[key] = parent
                parent = key

    def close(self) -> None:
        self._subscriber.close(linger=0)
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def addresses(folder: Path) -> tuple[str, str]:
    """Where to publish and to replay."""
    return f"ipc://{folder}/events", f"ipc://{folder}/replay"

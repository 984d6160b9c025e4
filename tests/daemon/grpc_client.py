"""A client of the gRPC door that shares nothing with the daemon but the .proto files."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc

from kvstore.hashing import Chain
from kvstore.identity import Namespace
from kvstore.proto import admin_pb2_grpc, store_pb2, store_pb2_grpc
from tests.daemon.doors import Daemon
from tests.store.rig import PATIENCE_S, content

PIECE = 100_000  # bytes of a put in one message: no whole number of blocks


class Got(NamedTuple):
    """What a Get has brought: `data` of `blocks` blocks, by where each message's came from."""

    blocks: int
    miss: str
    data: bytes
    sources: list[str]  # of each block


class GrpcClient:
    """One connection, with one token."""

    def __init__(self, address: str, token: str | None = None, **tls: Any) -> None:
        """`tls`: as for `grpc.ssl_channel_credentials`."""
        # Or two clients of one test would share a connection.
        own = [("grpc.use_local_subchannel_pool", 1)]
        if tls:
            credentials = grpc.ssl_channel_credentials(**tls)
            self.channel = grpc.secure_channel(address, credentials, options=own)
        else:
            self.channel = grpc.insecure_channel(address, options=own)
        self._metadata = [] if token is None else [("authorization", f"Bearer {token}")]
        self.store: Any = store_pb2_grpc.StoreStub(self.channel)
        self.admin: Any = admin_pb2_grpc.AdminStub(self.channel)

    def ask(self, method: Any, request: Any) -> Any:
        return method(request, metadata=self._metadata, timeout=PATIENCE_S)

    def start_get(self, blocks: Chain, **options: Any) -> Any:
        """The call: it can be iterated, and cancelled."""
        return self.ask(self.store.Get, store_pb2.GetRequest(chain=message(blocks), **options))

    def get(self, blocks: Chain, **options: Any) -> Got:
        """Every message in its place, or this fails."""
        call = self.start_get(blocks, **options)
        begun = next(call).begun
        data, sources = b"", list[str]()
        for reply in call:
            if reply.WhichOneof("part") == "ended":
                assert list(call) == []
                assert len(data) == reply.ended.blocks * begun.block_bytes
                miss = store_pb2.Miss.Name(reply.ended.miss)
                return Got(reply.ended.blocks, miss, data, sources)
            piece = reply.piece
            assert piece.block * begun.block_bytes + piece.offset == len(data)
            data += piece.data
            whole = len(data) // begun.block_bytes
            sources += [store_pb2.Tier.Name(piece.source)] * (whole - len(sources))
        raise AssertionError("a get without an end")

    def put(self, blocks: Chain, **retention: Any) -> int:
        """Offer the blocks, send what is wanted; returns how many were stored."""
        with self.start_put(blocks, **retention) as put:
            put.send(b"".join(content(blocks.keys[i], put.block_bytes) for i in put.wanted))
            return put.end()

    def start_put(self, blocks: Chain, **retention: Any) -> Put:
        return Put(self, blocks, retention)

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Put:
    """A put up to where the daemon has said what it wants."""

    def __init__(self, client: GrpcClient, blocks: Chain, retention: dict[str, Any]) -> None:
        self._requests: queue.SimpleQueue[store_pb2.PutRequest | None] = queue.SimpleQueue()
        self.call = client.ask(client.store.Put, self._sent())
        asked = store_pb2.Retention(**retention)
        begin = store_pb2.PutBegin(chain=message(blocks), retention=asked)
        self._requests.put(store_pb2.PutRequest(begin=begin))
        self.wanted: Sequence[int] = []
        try:
            reply = next(self.call).wanted
        except BaseException:
            self._requests.put(None)
            raise
        self.wanted, self.block_bytes = list(reply.blocks), reply.block_bytes

    def send(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE):
            self._requests.put(store_pb2.PutRequest(data=data[start : start + PIECE]))

    def send_message(self, request: store_pb2.PutRequest) -> None:
        self._requests.put(request)

    def end(self) -> int:
        """Close our side; returns how many blocks were committed. Raises grpc.RpcError."""
        self._requests.put(None)
        committed: int = next(self.call).committed.blocks
        assert list(self.call) == []
        return committed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.call.cancel()
        self._requests.put(None)

    def _sent(self) -> Iterator[store_pb2.PutRequest]:
        return iter(self._requests.get, None)


def holds_nothing(daemon: Daemon) -> None:
    """Wait until no call holds anything any more; what is being written to NVMe is pinned too."""
    daemon.until(lambda: not daemon.service.sessions)
    daemon.until(lambda: daemon.store.stats().ram["pinned_blocks"] == 0)
    daemon.store.check_invariants()


def message(blocks: Chain) -> store_pb2.Chain:
    """A chain as the wire has it; without a parent where it is the start of a prompt."""
    starts = blocks.parent == blocks.namespace.fingerprint
    return store_pb2.Chain(
        namespace=namespace(blocks.namespace),
        parent=b"" if starts else blocks.parent,
        keys=b"".join(blocks.keys),
    )


def namespace(asked: Namespace) -> store_pb2.Namespace:
    return store_pb2.Namespace(**dataclasses.asdict(asked))

"""KV events over ZeroMQ, as vLLM publishes its own, for routers that follow those.

A PUB socket sends batches of three frames: topic, sequence number (8 bytes, big-endian),
payload. A ROUTER socket sends again what a subscriber has missed: asked with an empty frame
and the sequence number to begin with, it answers with what it still has in frames of an
empty one and those three, and at the end with the number -1 and no payload.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from kvstore.daemon.following import Following
from kvstore.daemon.listening import is_loopback
from kvstore.daemon.service import Service
from kvstore.daemon.vllm_schema import KVEventBatch, translate
from kvstore.errors import FallenBehindError, SettingsError
from kvstore.events import Cleared, Event, Stored, pieces
from kvstore.identity import Namespace

log = logging.getLogger(__name__)

TOPIC = b""  # vLLM's own default
END = (-1).to_bytes(8, "big", signed=True)
PIECE_BLOCKS = 1024  # of a snapshot, in one batch
QUEUED_BATCHES = 4096  # for one subscriber; beyond, it misses some, as their numbers tell it
REPLAYED_BATCHES = 10_000  # kept for who has missed some, as vLLM does
REPLAYED_BYTES = 64 << 20  # of them at most
LINGER_MS = 500  # for the last batch when the daemon ends


class ZmqDoor:
    """Publishes from the event loop that opened it."""

    def __init__(self, service: Service, publish: str, replay: str | None) -> None:
        """Listen on these addresses, such as tcp://127.0.0.1:5557. The service is borrowed.

        Raises SettingsError where that is not possible.
        """
        self._store = service.store
        self._store.feed.start(service.limits.event_log_blocks)
        self._following = Following(self._store.feed)
        self._namespaces: dict[bytes, Namespace] = {}
        self._looked_up: set[bytes] = set()
        self._sent: deque[tuple[bytes, bytes]] = deque()  # number, payload
        self._sent_bytes = 0
        self._number = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._context = zmq.asyncio.Context()
        try:
            self._publisher = _bind(self._context, zmq.PUB, publish, "daemon.zmq")
            self._publisher.setsockopt(zmq.LINGER, LINGER_MS)
            self._replayer = None
            if replay is not None:
                self._replayer = _bind(self._context, zmq.ROUTER, replay, "daemon.zmq_replay")
        except SettingsError:
            self._context.destroy(linger=0)
            raise
        self._tasks = [asyncio.create_task(_logged(self._publish()))]
        if self._replayer is not None:
            self._tasks.append(asyncio.create_task(_logged(self._replay(self._replayer))))

    @property
    def address(self) -> str:
        """Where it publishes, with the port that it was given where it left that open."""
        return self._publisher.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def replay_address(self) -> str | None:
        """Where it sends again, if anywhere."""
        if self._replayer is None:
            return None
        return self._replayer.getsockopt_string(zmq.LAST_ENDPOINT)

    async def close(self) -> None:
        """Tell subscribers that nothing can be had any more, and stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._send([Cleared()])
        if self._replayer is not None:
            self._replayer.close(linger=0)
        self._publisher.close()
        await asyncio.to_thread(self._context.term)  # waits for what lingers

    async def _publish(self) -> None:
        while True:
            with contextlib.suppress(FallenBehindError):
                await self._publish_all()
                return
            log.warning("KV events: more happens than can be published; beginning anew")

    async def _publish_all(self) -> None:
        """What is held, and then what happens. Raises FallenBehindError."""
        last_id, held = await asyncio.to_thread(self._snapshot)
        await self._send([Cleared()])  # what subscribers knew of may be gone
        while held:
            await self._send([held.popleft()])
        async with contextlib.aclosing(self._following.read(last_id)) as batches:
            async for batch in batches:
                await self._send([event for _, event in batch])

    def _snapshot(self) -> tuple[int, deque[Stored]]:
        """What is held, and the number of the last event before. A few seconds for a million."""
        last_id, contents = self._store.feed.snapshot()
        return last_id, deque(pieces(contents, PIECE_BLOCKS))

    async def _send(self, events: Sequence[Event]) -> None:
        self._learn(events)
        translated = list(translate(events, self._namespaces.get))
        payload = self._encoder.encode(KVEventBatch(time.time(), translated, 0))
        number = self._number.to_bytes(8, "big")
        self._number += 1
        self._sent.append((number, payload))
        self._sent_bytes += len(payload)
        while len(self._sent) > REPLAYED_BATCHES or self._sent_bytes > REPLAYED_BYTES:
            self._sent_bytes -= len(self._sent.popleft()[1])
        await self._publisher.send_multipart([TOPIC, number, payload])
        await asyncio.sleep(0)  # sending never waits, and others want their turn as well

    def _learn(self, events: Iterable[Event]) -> None:
        """See to it that the namespaces of these events are known."""
        named = {event.namespace for event in events if not isinstance(event, Cleared)}
        if not named <= self._looked_up:
            self._looked_up |= named
            self._namespaces = self._store.inventory.namespaces()

    async def _replay(self, replayer: zmq.asyncio.Socket) -> None:
        while True:
            asked = await replayer.recv_multipart()
            if len(asked) != 3 or len(asked[2]) != 8:
                log.warning("KV events: a replay was asked for in a way that is not understood")
                continue
            who, _, first = asked
            for number, payload in list(self._sent):
                if number >= first:
                    await replayer.send_multipart([who, b"", TOPIC, number, payload])
                    await asyncio.sleep(0)
            await replayer.send_multipart([who, b"", b"", END, b""])


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except Exception:
        log.exception("KV events are no longer published")


def _bind(context: zmq.asyncio.Context, kind: int, address: str, origin: str) -> zmq.asyncio.Socket:
    scheme, _, place = address.partition("://")
    if scheme == "tcp" and not is_loopback(place.rpartition(":")[0].strip("[]")):
        raise SettingsError(
            f"{origin} = {address}: subscribers are not asked who they are, so this opens to this "
            "machine only: listen on tcp://127.0.0.1, and let others in through a tunnel or proxy"
        )
    socket = context.socket(kind)
    # A whole replay must fit, or ROUTER would drop the rest in silence; and a reader's pace is
    # only known to within half the limit, so twice that.
    limit = QUEUED_BATCHES if kind == zmq.PUB else 2 * (REPLAYED_BATCHES + 1)
    socket.setsockopt(zmq.SNDHWM, limit)
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise SettingsError(f"{origin} = {address}: cannot listen there: {error}") from None
    return socket

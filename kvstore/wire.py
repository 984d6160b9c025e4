"""What goes over a connection between a client and the daemon: frames, and the messages in them.

A frame is a u32 length, little-endian, and so many bytes of msgpack: an array that begins
with the message's name. Every field has a type and a bound, checked as it is decoded
(msgspec), so what comes out of here is well formed, whoever sent it. Block bytes are in no
frame. A local client reads and writes them in the arena, whose memfd comes with `Welcome`.
On the data door they follow the frame that announces them: `Payload`, `Commit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from kvstore.errors import WireError
from kvstore.hashing import KEY_BYTES, Key
from kvstore.retention import MAX_PRIORITY

VERSION = 1
MAX_FRAME_BYTES = 4 << 20
MAX_KEYS = 65_536  # of one call
CHECKED_KEYS = 256  # of one call that reads blocks to check them
LENGTH_BYTES = 4
FLUSH_S = 1.0

Seq = Annotated[int, Meta(ge=0, le=1 << 62)]
Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
KeyField = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
KeysField = Annotated[bytes, Meta(max_length=MAX_KEYS * KEY_BYTES)]
Packed = Annotated[bytes, Meta(max_length=MAX_KEYS * 8)]
Priority = Annotated[int, Meta(ge=0, le=MAX_PRIORITY)]
Text = Annotated[str, Meta(max_length=4096)]


class _Message(Struct, array_like=True, forbid_unknown_fields=True):
    """`seq` pairs a reply with its request; requests without one have no reply."""


# ---- from the client


class Hello(_Message, tag="hello"):
    """First on every connection. `token` is for doors that ask for one."""

    version: Annotated[int, Meta(ge=0, lt=1 << 31)]
    client: Text
    token: Text = ""


class OpenNamespace(_Message, tag="open"):
    """`record` is `Namespace.to_json`. Reply: `NamespaceOpened`."""

    seq: Seq
    record: Annotated[str, Meta(max_length=16_384)]


class _ChainMessage(_Message):
    """Blocks of one prompt: a namespace opened on this connection, and 16 bytes a key."""

    seq: Seq
    namespace: Count
    parent: KeyField
    keys: KeysField


class ProbeChain(_ChainMessage, tag="probe"):
    """Reply: `Probed`."""


class Acquire(_ChainMessage, tag="acquire"):
    """Reply: `Leased`."""

    deadline_s: Seconds | None = None


class Release(_Message, tag="release"):
    """No reply."""

    lease: Count


class Reserve(_ChainMessage, tag="reserve"):
    """Reply: `Reserved`."""

    priority: Priority
    ttl_s: Seconds | None


class Commit(_Message, tag="commit"):
    """Reply: `Counted`. `payload_bytes` of the slots follow, in their order, on the data door."""

    seq: Seq
    reservation: Count
    payload_bytes: Count = 0


class Abort(_Message, tag="abort"):
    """No reply."""

    reservation: Count


class Prefetch(_ChainMessage, tag="prefetch"):
    """Reply: `Counted`."""


class Retain(_ChainMessage, tag="retain"):
    """Reply: `Answered`, the fields of `Retained`."""

    priority: Priority
    ttl_s: Seconds | None


class Evict(_ChainMessage, tag="evict"):
    """Reply: `Counted`."""


class Explain(_ChainMessage, tag="explain"):
    """Reply: `Answered`, the fields of `Explanation`."""


class GetStats(_Message, tag="stats"):
    """Reply: `Answered`, the fields of `Stats`."""

    seq: Seq


class Flush(_Message, tag="flush"):
    """Reply: `Counted`, 1 when NVMe has everything, 0 after `timeout_s`, or FLUSH_S: ask again."""

    seq: Seq
    timeout_s: Seconds


class ListNamespaces(_Message, tag="namespaces"):
    """Reply: `Answered`, the tiers that have tables, and `Namespace.to_json` by fingerprint in hex.

    Of this and what follows: for those with the right to administer; blocks of all tenants.
    """

    seq: Seq


class ListBlocks(_Message, tag="blocks"):
    """Reply: `Listed`. `start` is 0, or where the last page said that the next begins."""

    seq: Seq
    tier: Annotated[str, Meta(max_length=16)]
    start: Count


class EvictBlocks(_Message, tag="drop"):
    """Of whatever namespaces. Reply: `Counted`."""

    seq: Seq
    keys: KeysField


class CheckBlocks(_Message, tag="check"):
    """Compare what NVMe has of these with its checksums. Reply: `Answered`, as `tier.Checked`.

    `damaged` holds keys of 16 bytes, one after the other.
    """

    seq: Seq
    keys: Annotated[bytes, Meta(max_length=CHECKED_KEYS * KEY_BYTES)]


class GetStatus(_Message, tag="status"):
    """Reply: `Answered`: the process, its clients, and the blocks of each namespace."""

    seq: Seq


InventoryRequest = ListNamespaces | ListBlocks | EvictBlocks | CheckBlocks | GetStatus

Request = (
    Hello
    | OpenNamespace
    | ProbeChain
    | Acquire
    | Release
    | Reserve
    | Commit
    | Abort
    | Prefetch
    | Retain
    | Evict
    | Explain
    | GetStats
    | Flush
    | InventoryRequest
)


# ---- from the daemon


class Welcome(_Message, tag="welcome"):
    """The answer to `Hello`. `arena_bytes` is 0 where there is no arena to share."""

    version: Count
    server: Text
    arena_bytes: Count = 0


class NamespaceOpened(_Message, tag="opened"):
    seq: Seq
    namespace: Count


class Probed(_Message, tag="probed"):
    """`tiers[i]` indexes TIERS. What NVMe has queued and costs is for the client's planner."""

    seq: Seq
    tiers: Annotated[bytes, Meta(max_length=MAX_KEYS)]
    queued_bytes: Count
    latency_s: float
    s_per_byte: float
    observations: Count


class Leased(_Message, tag="leased"):
    """`offsets` in the arena, u64 each, of the blocks ready so far; `sources[i]` indexes TIERS.

    On the data door there are no offsets: the blocks come after `Payload`.
    """

    seq: Seq
    lease: Count
    sources: Annotated[bytes, Meta(max_length=MAX_KEYS)]
    offsets: Packed
    miss: Text | None


class Progress(_Message, tag="progress"):
    """Unasked: more of a lease is ready (`offsets`), or it now ends after `blocks` for `miss`."""

    lease: Count
    blocks: Count
    offsets: Packed
    miss: Text | None


class Payload(_Message, tag="payload"):
    """Unasked, on the data door: `blocks` more blocks of a lease; their bytes follow."""

    lease: Count
    blocks: Count
    payload_bytes: Count


class Reserved(_Message, tag="reserved"):
    """`indices`, u32 each, of the blocks that got a slot; `offsets` in the arena, u64 each.

    On the data door there are no offsets: the blocks go after `Commit`.
    """

    seq: Seq
    reservation: Count
    indices: Packed
    offsets: Packed


class Listed(_Message, tag="listed"):
    """`rows` of `frame.RECORD_DTYPE`; `following` is where the next page begins, if any."""

    seq: Seq
    rows: Annotated[bytes, Meta(max_length=MAX_FRAME_BYTES)]
    following: Count | None


class Counted(_Message, tag="counted"):
    seq: Seq
    count: Count


class Answered(_Message, tag="answered"):
    seq: Seq
    fields: dict[str, Any]


class Failed(_Message, tag="failed"):
    """The request was refused. `kind` is the name of an error of `kvstore.errors`.

    With `seq` 0 the connection is about to be closed.
    """

    seq: Seq
    kind: Text
    message: Text


Reply = (
    Welcome
    | NamespaceOpened
    | Probed
    | Leased
    | Progress
    | Payload
    | Reserved
    | Listed
    | Counted
    | Answered
    | Failed
)

TIERS: tuple[str | None, ...] = (None, "ram", "nvme", "remote")
_TIER_NUMBERS = {tier: number for number, tier in enumerate(TIERS)}

_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(Request)
_reply_decoder = msgspec.msgpack.Decoder(Reply)


def encode(message: _Message) -> bytes:
    """One frame. Raises WireError where it is too long."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"a message of {len(body)} bytes is longer than {MAX_FRAME_BYTES}")
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def body_bytes(prefix: bytes | bytearray | memoryview) -> int:
    """The length of the body that follows this length prefix. Raises WireError."""
    length = int.from_bytes(prefix, "little")
    if not 0 < length <= MAX_FRAME_BYTES:
        raise WireError(f"a frame of {length} bytes: not one of ours, or longer than allowed")
    return length


def decode_request(body: bytes | bytearray | memoryview) -> Request:
    """What a client sent. Raises WireError for anything that is not one message of ours."""
    try:
        request: Request = _request_decoder.decode(body)
        return request
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not a request of protocol version {VERSION}: {error}") from error


def decode_reply(body: bytes | bytearray | memoryview) -> Reply:
    """What a daemon sent. Raises WireError for anything that is not one message of ours."""
    try:
        reply: Reply = _reply_decoder.decode(body)
        return reply
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"not a reply of protocol version {VERSION}: {error}") from error


def pack_keys(keys: Sequence[Key]) -> bytes:
    return b"".join(keys)


def unpack_keys(data: bytes) -> tuple[Key, ...]:
    """16 bytes each. Raises WireError for a broken one at the end."""
    if len(data) % KEY_BYTES:
        raise WireError(f"{len(data)} bytes are no whole number of keys")
    return tuple(np.frombuffer(data, f"V{KEY_BYTES}").tolist())


def pack_tiers(tiers: Sequence[str | None]) -> bytes:
    """A byte for each, its place in TIERS."""
    if tiers and tiers.count(tiers[0]) == len(tiers):
        return bytes([_TIER_NUMBERS[tiers[0]]]) * len(tiers)
    return bytes(map(_TIER_NUMBERS.__getitem__, tiers))


def unpack_offsets(data: bytes) -> NDArray[np.uint64]:
    return _unpack(data, np.dtype("<u8"))


def unpack_indices(data: bytes) -> list[int]:
    indices: list[int] = _unpack(data, np.dtype("<u4")).tolist()
    return indices


def _unpack(data: bytes, dtype: np.dtype[Any]) -> NDArray[Any]:
    if len(data) % dtype.itemsize:
        raise WireError(f"{len(data)} bytes are no whole number of {dtype} values")
    return np.frombuffer(data, dtype)

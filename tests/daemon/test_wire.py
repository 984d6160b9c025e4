"""What comes off a connection: whatever it is, it is a message of ours or a WireError."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvstore import wire
from kvstore.errors import WireError
from kvstore.wire import Acquire, Hello, Leased, OpenNamespace, Progress, Release, Reserve

PARENT = b"p" * 16
REQUESTS: tuple[wire.Request, ...] = (
    Hello(1, "c"),
    OpenNamespace(1, "{}"),
    wire.ProbeChain(2, 0, PARENT, b"k" * 32),
    Acquire(3, 0, PARENT, b"k" * 32, 0.5),
    Acquire(3, 0, PARENT, b""),
    Release(7),
    Reserve(4, 0, PARENT, b"k" * 16, 50, None),
    wire.Commit(5, 8),
    wire.Abort(8),
    wire.Prefetch(6, 0, PARENT, b"k" * 16),
    wire.Retain(7, 0, PARENT, b"k" * 16, 80, 60.0),
    wire.Evict(8, 0, PARENT, b"k" * 16),
    wire.Explain(9, 0, PARENT, b"k" * 16),
    wire.GetStats(10),
    wire.Flush(11, 1.0),
)
REPLIES: tuple[wire.Reply, ...] = (
    wire.Welcome(1, "s", 4096),
    wire.NamespaceOpened(1, 0),
    wire.Probed(2, b"\0\1\2", 5, 0.1, 0.2, 3),
    Leased(3, 1, b"\1\2", b"o" * 8, None),
    Progress(1, 2, b"o" * 8, "deadline"),
    wire.Payload(1, 2, 16),
    wire.Reserved(4, 8, b"i" * 4, b"o" * 8),
    wire.Counted(5, 1),
    wire.Answered(6, {"a": {"b": 1}}),
    wire.Failed(7, "RequestError", "no"),
)
MESSAGES = (*REQUESTS, *REPLIES)
DECODERS = (wire.decode_request, wire.decode_reply)


def body(message: wire.Request | wire.Reply) -> bytes:
    return wire.encode(message)[wire.LENGTH_BYTES :]


def is_refused_or_whole(data: bytes) -> None:
    """Decoded by both; what comes out says the same when it is encoded again."""
    for decode in DECODERS:
        try:
            message = decode(data)
        except WireError:
            continue
        assert repr(decode(body(message))) == repr(message)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_come_out_as_they_went_in(message: wire.Request | wire.Reply) -> None:
    frame = wire.encode(message)
    assert wire.body_bytes(frame[:4]) == len(frame) - 4
    own, other = DECODERS if message in REQUESTS else DECODERS[::-1]
    assert own(frame[4:]) == message
    assert own(memoryview(frame)[4:]) == message
    with pytest.raises(WireError, match="protocol version"):
        other(frame[4:])


@pytest.mark.parametrize("field", ["seconds", "key", "priority", "count", "length", "more"])
def test_every_field_has_its_bounds(field: str) -> None:
    wrong: dict[str, list[Any]] = {
        "seconds": [["flush", 1, each] for each in (math.nan, math.inf, -1.0, 1e10, "1", None)],
        "key": [["probe", 1, 0, each, b""] for each in (b"p" * 15, b"p" * 17, "p" * 16, None)],
        "priority": [["reserve", 1, 0, PARENT, b"", each, None] for each in (-1, 101, 1.5, "5")],
        "count": [["release", each] for each in (-1, 1 << 63, 1.0, None, b"1")],
        "length": [
            ["probe", 1, 0, PARENT, b"k" * (16 * wire.MAX_KEYS + 1)],
            ["open", 1, "x" * 16_385],
            ["hello", 1, "x" * 4097],
        ],
        "more": [["stats"], ["stats", 1, 2], ["unknown", 1], ["", 1], [], [1, 2], {"stats": 1}],
    }
    for each in wrong[field]:
        with pytest.raises(WireError):
            wire.decode_request(msgspec.msgpack.encode(each))


@pytest.mark.parametrize("length", [0, wire.MAX_FRAME_BYTES + 1, (1 << 32) - 1])
def test_no_frame_is_so_long(length: int) -> None:
    with pytest.raises(WireError, match="frame of"):
        wire.body_bytes(length.to_bytes(4, "little"))


@pytest.mark.parametrize("nbytes", [1, 15, 17])
def test_no_half_keys_or_offsets(nbytes: int) -> None:
    with pytest.raises(WireError, match="whole number"):
        wire.unpack_keys(b"k" * nbytes)
    for unpack in (wire.unpack_offsets, wire.unpack_indices):
        with pytest.raises(WireError, match="whole number"):
            unpack(b"k" * nbytes)


def test_nesting_is_no_way_in() -> None:
    for data in (b"\x91" * 100_000, b"\x81" * 100_000, b"\x81\xa1a" * 100_000):
        is_refused_or_whole(data)
        is_refused_or_whole(b"\x93\xa8answered\x01\x81\xa1a" + data)


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xc1")
def test_random_bytes(data: bytes) -> None:
    is_refused_or_whole(data)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(1 << 63), (1 << 64) - 1)
        | st.floats()
        | st.text(max_size=20)
        | st.binary(max_size=40),
        lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=12,
    ),
    st.sampled_from([type(message).__struct_config__.tag for message in MESSAGES]),
)
def test_random_fields(value: object, tag: object) -> None:
    fields = value if isinstance(value, list) else [value]
    is_refused_or_whole(msgspec.msgpack.encode([tag, *fields]))


@given(st.sampled_from(MESSAGES), st.data())
def test_damaged_messages(message: wire.Request | wire.Reply, data: st.DataObject) -> None:
    """Bytes changed, cut out, put in, cut off."""
    damaged = bytearray(body(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged)))
        match data.draw(st.sampled_from(["change", "insert", "remove", "end"])):
            case "change" if at < len(damaged):
                damaged[at] = data.draw(st.integers(0, 255))
            case "insert":
                damaged[at:at] = data.draw(st.binary(max_size=5))
            case "remove":
                del damaged[at : at + data.draw(st.integers(0, 5))]
            case "end":
                del damaged[at:]
    is_refused_or_whole(bytes(damaged))

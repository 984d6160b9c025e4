"""The messages of `kvstore/proto/store.proto`, checked and turned into what the store takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from kvstore import wire
from kvstore.answers import NVME, RAM, Explanation, Stats
from kvstore.daemon.session import MAX_BLOCK_BYTES
from kvstore.errors import LayoutError, RequestError
from kvstore.hashing import KEY_BYTES, Chain
from kvstore.identity import Namespace
from kvstore.lease import Lease
from kvstore.proto import store_pb2 as pb
from kvstore.retention import DEFAULT_PRIORITY, Retention
from kvstore.tenant import Tenant
from kvstore.tier import Miss

MAX_RECORD_BYTES = 16_384  # of a namespace, as on the other doors
LONGEST_S = 1e9
PIECE_BYTES = 1 << 20

_OPTIONAL = ("kv_quantisation", "layout_version", "hash_algorithm")
_PLAIN = tuple(field.name for field in dataclasses.fields(Namespace) if field.name not in _OPTIONAL)
_MISSES = {miss: getattr(pb, f"MISS_{miss.name}") for miss in Miss}
_TIERS: dict[str | None, pb.Tier] = {
    None: pb.TIER_UNSPECIFIED,
    RAM: pb.TIER_RAM,
    NVME: pb.TIER_NVME,
    "remote": pb.TIER_REMOTE,
}


# ---- what a client says


def namespace(message: pb.Namespace) -> Namespace:
    """Raises RequestError."""
    fields: dict[str, Any] = {name: getattr(message, name) for name in _PLAIN}
    fields |= {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    try:
        asked = Namespace(**fields)
    except LayoutError as error:
        raise RequestError(f"namespace: {error}") from None
    if asked.layout.block_bytes > MAX_BLOCK_BYTES:
        raise RequestError(f"namespace: blocks of more than {MAX_BLOCK_BYTES} bytes are not kept")
    if len(asked.to_json()) > MAX_RECORD_BYTES:
        raise RequestError(f"namespace: more than {MAX_RECORD_BYTES} bytes of text")
    return asked


def chain(message: pb.Chain, tenant: Tenant) -> Chain:
    """What the store knows a tenant's chain as. Raises RequestError."""
    asked = namespace(message.namespace)
    if len(message.keys) > wire.MAX_KEYS * KEY_BYTES:
        raise RequestError(f"chain: more than {wire.MAX_KEYS} keys")
    if len(message.keys) % KEY_BYTES:
        raise RequestError(f"chain: {len(message.keys)} bytes are no whole number of keys")
    if len(message.parent) not in (0, KEY_BYTES):
        raise RequestError(f"chain: a parent of {len(message.parent)} bytes, and not {KEY_BYTES}")
    parent = message.parent or asked.fingerprint
    return tenant.chain(asked, tenant.namespace(asked), parent, wire.unpack_keys(message.keys))


def retention(message: pb.Retention) -> Retention:
    """Raises RequestError."""
    return Retention(
        message.priority if message.HasField("priority") else DEFAULT_PRIORITY,
        message.ttl_s if message.HasField("ttl_s") else None,
    )


def seconds(value: float, name: str) -> float:
    """Raises RequestError."""
    if not 0 <= value <= LONGEST_S:
        raise RequestError(f"{name}: {value} is not from 0 to {LONGEST_S:g} seconds")
    return value


# ---- what it is told


def miss(reason: Miss | None) -> pb.Miss:
    return pb.MISS_UNSPECIFIED if reason is None else _MISSES[reason]


def tiers(found: Sequence[str | None]) -> list[pb.Tier]:
    return [_TIERS[tier] for tier in found]


def explanation(found: Explanation) -> pb.ExplainReply:
    return pb.ExplainReply(
        blocks=found.blocks,
        present=found.present,
        breaks_at=found.breaks_at,
        miss=miss(None if found.reason is None else Miss(found.reason)),
        namespace_known=found.namespace_known,
        nearest=found.nearest or "",
        differences=[
            pb.Difference(field=name, asked=str(asked), stored=str(stored))
            for name, (asked, stored) in found.differences.items()
        ],
    )


def stats(found: Stats) -> pb.StatsReply:
    groups = found.to_dict().items()
    return pb.StatsReply(
        **{group: {name: int(value) for name, value in of.items()} for group, of in groups}
    )


def record(known: Namespace) -> pb.Namespace:
    return pb.Namespace(**dataclasses.asdict(known))


# ---- bytes


def pieces(lease: Lease, start: int, stop: int, block_bytes: int) -> Iterator[pb.Piece]:
    """The bytes of blocks `[start, stop)` of a lease, all of them ready; each piece is a copy."""
    views, sources = lease.views, lease.sources
    while start < stop:
        source = sources[start]
        end = next((i for i in range(start, stop) if sources[i] != source), stop)
        for begin in range(start * block_bytes, end * block_bytes, PIECE_BYTES):
            block, offset = divmod(begin, block_bytes)
            data = gather(views, begin, min(begin + PIECE_BYTES, end * block_bytes))
            yield pb.Piece(block=block, offset=offset, source=_TIERS[source], data=data)
        start = end


def gather(views: Sequence[memoryview], begin: int, end: int) -> bytes:
    """Bytes `[begin, end)` of blocks of one length that lie one after the other."""
    nbytes = len(views[0])
    parts = []
    while begin < end:
        block, offset = divmod(begin, nbytes)
        part = views[block][offset : offset + end - begin]
        parts.append(part)
        begin += len(part)
    return b"".join(parts)


def scatter(views: Sequence[memoryview], begin: int, data: bytes) -> None:
    """Write `data` at byte `begin` of blocks of one length that lie one after the other."""
    rest = memoryview(data)
    while rest:
        nbytes = len(views[0])
        block, offset = divmod(begin, nbytes)
        part = rest[: nbytes - offset]
        views[block][offset : offset + len(part)] = part
        begin += len(part)
        rest = rest[len(part) :]

"""The tiers that the conformance suite runs, and how to reach behind the back of each."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from kvstore.hashing import Key
from kvstore.identity import Namespace
from kvstore.tier import ReadRequest, ReadResult, Record, Tier, WriteItem
from kvstore.tiers.faulty import Faults, FaultyLocalTier, FaultyTier
from kvstore.tiers.nvme import NvmeTier
from kvstore.tiers.ram import RamTier

T = TypeVar("T")

MODEL = Namespace(
    model="m",
    weights="w",
    tokenizer="t",
    kv_dtype="bfloat16",
    layers=1,
    kv_heads=1,
    head_dim=8,
    block_tokens=4,
    rope="none",
)
NAMESPACE = MODEL.fingerprint
CAPACITY_BYTES = 4 << 20


def run(work: Awaitable[T]) -> T:
    async def main() -> T:
        return await work

    return asyncio.run(main())


def key(number: int) -> Key:
    return b"key-%012d" % number


def content(number: int, nbytes: int) -> bytes:
    """Bytes that no codec makes smaller, of their own for each block, the same on every run."""
    return random.Random(number).randbytes(nbytes)


def item(number: int, nbytes: int = 8192, **fields: Any) -> WriteItem:
    """A block to write; a chain of its own unless `parent` says otherwise."""
    fields = {"parent": NAMESPACE, "created_s": 1.0, "last_use_s": 1.0, **fields}
    record = Record(namespace=NAMESPACE, key=key(number), raw_bytes=nbytes, **fields)
    return WriteItem(record, memoryview(content(number, nbytes)))


def request(number: int, nbytes: int = 8192) -> ReadRequest:
    return ReadRequest(key(number), NAMESPACE, nbytes, memoryview(bytearray(nbytes)))


async def get(tier: Tier, number: int, nbytes: int = 8192) -> tuple[ReadResult, bytes]:
    asked = request(number, nbytes)
    (result,) = await tier.read([asked])
    return result, bytes(asked.buffer)


@dataclass(frozen=True)
class Subject:
    """A tier under test: `stored` reads and `damage` changes a block behind its back."""

    name: str
    open: Callable[[Path], Tier]
    stored: Callable[[Any, Path, Key], bytes]
    flip: Callable[[Any, Path, Key, int], None]  # bit number of the stored bytes

    def __str__(self) -> str:
        return self.name


def extent(tier: NvmeTier, wanted: Key) -> tuple[int, int]:
    """Offset and length of a block in the slab, from the records on the disk."""
    offsets, records = tier._slab.records.load()
    for offset, row in zip(offsets.tolist(), records.rows, strict=True):
        if row["key"].item() == wanted:
            return offset, int(row["stored_bytes"])
    raise KeyError(wanted)


def flip_in_file(path: Path, offset: int, bit: int) -> None:
    with open(path, "r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset + bit // 8)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), offset + bit // 8)


def _nvme_stored(tier: NvmeTier, folder: Path, wanted: Key) -> bytes:
    offset, nbytes = extent(tier, wanted)
    with open(folder / "slab", "rb", buffering=0) as file:
        return os.pread(file.fileno(), nbytes, offset)


def _nvme_flip(tier: NvmeTier, folder: Path, wanted: Key, bit: int) -> None:
    flip_in_file(folder / "slab", extent(tier, wanted)[0], bit)


def _ram_view(tier: RamTier, wanted: Key) -> memoryview:
    row = tier.slots.index.rows_by_key[wanted]
    start = int(tier.slots.index.offset[row])
    return tier.buffer[start : start + int(tier.slots.index.nbytes[row])]


def _ram_stored(tier: RamTier, folder: Path, wanted: Key) -> bytes:
    with _ram_view(tier, wanted) as view:
        return bytes(view)


def _ram_flip(tier: RamTier, folder: Path, wanted: Key, bit: int) -> None:
    with _ram_view(tier, wanted) as view:
        view[bit // 8] ^= 1 << bit % 8


def _faulty_stored(tier: FaultyTier, folder: Path, wanted: Key) -> bytes:
    return _nvme_stored(tier._tier, folder, wanted)  # type: ignore[arg-type]


def _faulty_flip(tier: FaultyTier, folder: Path, wanted: Key, bit: int) -> None:
    _nvme_flip(tier._tier, folder, wanted, bit)  # type: ignore[arg-type]


@contextmanager
def o_direct_refused() -> Iterator[None]:
    """The kernel answers as a file system without O_DIRECT makes it answer."""
    kernel_open = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return kernel_open(path, flags, *args, **kwargs)

    with patch("os.open", refuse):
        yield


def _buffered(folder: Path) -> NvmeTier:
    with o_direct_refused():
        return NvmeTier(folder, CAPACITY_BYTES)


def _nvme(name: str, **options: Any) -> Subject:
    def open_tier(folder: Path) -> NvmeTier:
        return NvmeTier(folder, CAPACITY_BYTES, **options)

    return Subject(name, open_tier, _nvme_stored, _nvme_flip)


SUBJECTS = (
    Subject("ram", lambda folder: RamTier(CAPACITY_BYTES), _ram_stored, _ram_flip),
    _nvme("nvme"),
    _nvme("nvme, zstd", codec="zstd"),
    _nvme("nvme, threads", driver="threads"),
    _nvme("nvme, sync", durability="sync"),
    Subject("nvme, buffered", _buffered, _nvme_stored, _nvme_flip),
    Subject(
        "faulty without faults",
        lambda folder: FaultyLocalTier(NvmeTier(folder, CAPACITY_BYTES), Faults()),
        _faulty_stored,
        _faulty_flip,
    ),
)

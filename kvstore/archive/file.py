"""The form of an archive: a header, then one frame after the other.

The header is a name, a version and a checksum. Then come the frames of `kvstore.frame`: a
block's is its record and its bytes, raw. A namespace's carries `Namespace.to_json`; its
record has the fingerprint for namespace, key and parent, as no block has. It stands before
the blocks of its namespace, twice, so that no one flipped bit takes them all. The last frame
has a record of zero names, whose `raw_bytes` is the number of blocks in the file.

Whatever is damaged is passed over: by the length in its record where that is sound, and
otherwise up to the next record that is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from kvstore.errors import FrameError, InputError
from kvstore.frame import HEADER_BYTES, MAGIC, checksum, pack_header, unpack_header
from kvstore.hashing import KEY_BYTES
from kvstore.identity import Namespace
from kvstore.tier import Record

VERSION = 1
MAX_BLOCK_BYTES = 1 << 30  # a longer one is none of ours
_NAME = b"kvstore archive"
_CHECKSUM_BYTES = 8
_NO_NAME = bytes(KEY_BYTES)
_WINDOW_BYTES = 1 << 20  # read at once when looking for the next sound record


class Block(NamedTuple):
    """A block whose bytes are those that were written. `start` is where its frame begins."""

    start: int
    record: Record
    stored: bytes


class Damage(NamedTuple):
    """Something that is not what was written; what could be told of it."""

    start: int
    problem: str


class End(NamedTuple):
    """Everything was read. `blocks` is what the writer had written in all."""

    start: int
    blocks: int


Entry = Block | Namespace | Damage | End


class ArchiveWriter:
    """Writes one archive to a file opened for writing, which stays the caller's."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.blocks = 0
        self.nbytes = 0  # of blocks
        file.write(_header())

    def namespace(self, namespace: Namespace) -> None:
        """To be written before its blocks."""
        name, text = namespace.fingerprint, namespace.to_json().encode()
        header = pack_header(
            Record(name, name, name, len(text), stored_bytes=len(text), checksum=checksum(text))
        )
        self._file.write((header + text) * 2)

    def block(self, record: Record, stored: memoryview) -> None:
        """`record` says length and checksum of `stored`."""
        self._file.write(pack_header(record))
        self._file.write(stored)
        self.blocks += 1
        self.nbytes += stored.nbytes

    def end(self) -> None:
        """The last frame: what comes without it was cut off."""
        record = Record(_NO_NAME, _NO_NAME, _NO_NAME, self.blocks, checksum=checksum(b""))
        self._file.write(pack_header(record))


def read(file: BinaryIO, nbytes: int) -> Iterator[Entry]:
    """What is in an archive of `nbytes`, in order; one block in memory at a time.

    Raises InputError at once for a file that is none, or of a newer version.
    """
    damage = _check_header(file)
    return _entries(file, nbytes, damage)


def _entries(file: BinaryIO, nbytes: int, damage: Damage | None) -> Iterator[Entry]:
    if damage is not None:
        yield damage
    start = len(_header())
    while start < nbytes:
        file.seek(start)
        try:
            record = unpack_header(file.read(HEADER_BYTES))
        except FrameError as error:
            yield Damage(start, str(error))
            start = _next_record(file, start + 1, nbytes)
            continue
        after = start + HEADER_BYTES
        if record.namespace == record.key == _NO_NAME:
            yield End(start, record.raw_bytes)
            return
        end = after + record.stored_bytes
        if record.stored_bytes > MAX_BLOCK_BYTES:
            entry: Entry = Damage(start, f"a block of {record.stored_bytes} bytes is none of ours")
        elif end > nbytes:
            entry = Damage(start, "the file ends within the block")
        else:
            entry = _entry(start, record, file.read(record.stored_bytes))
        yield entry
        # Of what is damaged a piece may be missing, and the next record stand earlier.
        if isinstance(entry, Damage) and not _is_record(file, end):
            end = _next_record(file, start + 1, nbytes)
        start = end


def _entry(start: int, record: Record, stored: bytes) -> Entry:
    if checksum(stored) != record.checksum:
        return Damage(start, "the bytes do not match their checksum")
    if not record.namespace == record.key == record.parent:
        return Block(start, record, stored)
    try:
        namespace = Namespace.from_json(stored.decode())
    except ValueError as error:
        return Damage(start, str(error))
    if namespace.fingerprint != record.namespace:
        return Damage(start, "the namespace's record is another's")
    return namespace


def _is_record(file: BinaryIO, start: int) -> bool:
    """Whether a sound record stands there."""
    try:
        file.seek(start)
        unpack_header(file.read(HEADER_BYTES))
    except (FrameError, OSError, OverflowError):
        return False
    return True


def _next_record(file: BinaryIO, start: int, nbytes: int) -> int:
    """Where the next sound record begins; `nbytes` where there is none."""
    while start < nbytes:
        file.seek(start)
        window = file.read(_WINDOW_BYTES + HEADER_BYTES)
        place = window.find(MAGIC)
        while 0 <= place < _WINDOW_BYTES:
            try:
                unpack_header(window[place : place + HEADER_BYTES])
                return start + place
            except FrameError:
                place = window.find(MAGIC, place + 1)
        start += _WINDOW_BYTES
    return nbytes


def _header() -> bytes:
    name = _NAME + bytes([VERSION])
    return name + checksum(name).to_bytes(_CHECKSUM_BYTES, "little")


def _check_header(file: BinaryIO) -> Damage | None:
    """A header with a flipped bit is no reason to read nothing, if frames follow."""
    ours = _header()
    header, following = file.read(len(ours)), file.read(HEADER_BYTES)
    if header == ours:
        return None
    name, seal = header[:-_CHECKSUM_BYTES], header[-_CHECKSUM_BYTES:]
    if name[:-1] == _NAME and int.from_bytes(seal, "little") == checksum(name):
        raise InputError(
            f"written by a newer kvstore (version {name[-1]}, this one knows {VERSION}); upgrade"
        )
    try:
        unpack_header(following)
    except FrameError:
        raise InputError("not a file that `kvstore export` has written") from None
    return Damage(0, "the header is damaged")

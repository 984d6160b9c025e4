"""`kvstore export` and `kvstore import`: blocks in a file, to another machine or for later."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from kvstore.cli.options import json_option
from kvstore.cli.prompt import NAMING_KEYS
from kvstore.cli.selection import Selection, selection_options
from kvstore.cli.target import WHICH, Opened, Place, opened, place_options
from kvstore.errors import InputError, TierError
from kvstore.quantities import counted, format_size

if TYPE_CHECKING:
    from kvstore.archive.restore import Restored
    from kvstore.archive.save import Saved
    from kvstore.settings import Settings

SHOWN_DAMAGE = 10  # places in a file, for a person

_file = click.argument("archive", metavar="FILE", type=click.Path(path_type=Path, readable=False))


@click.command(
    "export",
    short_help="Write blocks to a file.",
    help=f"""Write all blocks of a store to FILE, or those of a namespace or a prompt.

    `kvstore import` puts them into another store, here or on another machine. FILE appears
    when it is complete, and takes the place of one of that name. Blocks are read as an
    engine reads them: they count as used.

    {WHICH}

    \b
    kvstore export everything.kv ~/.cache/kvstore/blocks
    kvstore export handbook.kv --prompt - --chat --model smollm2 < handbook.txt
    kvstore export model.kv --namespace 3f2a --store unix:///run/kvstore/kvstore.sock
    """,
)
@_file
@place_options(*NAMING_KEYS)
@selection_options
@json_option
def export(
    archive: Path, place: Place, settings: Settings, selection: Selection, as_json: bool
) -> int:
    from kvstore.archive.file import ArchiveWriter
    from kvstore.archive.save import save
    from kvstore.cli.console import print_json, progress
    from kvstore.cli.listing import Listing, owned

    with opened(place, settings) as store, _replacing(archive) as file:
        _check_readable(store)
        listing = selection.of(Listing.of(store.inventory))
        rows = listing.held.rows
        nameless = ~owned(rows, listing.namespaces)
        with progress(f"Writing {archive.name}") as report, _answering(store):
            rows = rows[~nameless]
            saved = save(store.store, listing.namespaces, rows, ArchiveWriter(file), report)
        if nameless.any():
            saved.missed["of unknown namespaces"] = int(nameless.sum())
        if not saved.blocks:
            why = _reasons(saved) or "no such block is stored"
            raise TierError(f"nothing was exported: {why}; {archive} is as it was")
        file_bytes = file.tell()
    if as_json:
        print_json(
            {
                "store": str(place),
                "file": str(archive),
                "blocks": saved.blocks,
                "raw_bytes": saved.nbytes,
                "file_bytes": file_bytes,
                "missed": saved.missed,
            }
        )
    else:
        _tell_saved(archive, saved)
    # What goes while a store is in use has gone.
    return 1 if saved.missed.keys() - {"evicted", "absent"} else 0


@click.command(
    "import",
    short_help="Put the blocks of such a file into a store.",
    help=f"""Put the blocks of FILE, which `kvstore export` has written, into a store.

    Every checksum is compared. What is damaged is left out, is named, and makes the exit
    status 1; so does a file that was cut off, or a store without room for all. Priorities
    stay what they were, as far as the store's bounds allow (store.protected_bytes), and a
    TTL goes on. Blocks that are there already are left alone. A DIR that is not there is
    made, of --nvme-bytes.

    {WHICH}

    \b
    kvstore import everything.kv ~/.cache/kvstore/blocks
    ssh host cat model.kv > model.kv && kvstore import model.kv --json
    """,
)
@_file
@place_options("nvme.capacity_bytes")
@json_option
def import_(archive: Path, place: Place, settings: Settings, as_json: bool) -> int:
    from kvstore.archive.file import read
    from kvstore.archive.restore import restore
    from kvstore.cli.console import print_json, progress

    with _reading(archive) as file:
        nbytes = os.fstat(file.fileno()).st_size
        try:
            entries = read(file, nbytes)
        except InputError as error:
            raise InputError(f"{archive}: {error}") from None
        if place.url is None and not place.path.exists():
            _make(place.path, settings)
        with (
            opened(place, settings) as store,
            progress(f"Reading {archive.name}") as report,
            _answering(store),
        ):
            restored = restore(store.store, entries, time.time(), lambda done: report(done, nbytes))
            if store.client is not None:
                store.client.check_connected()
            else:
                restored.evicted = _left_in_ram(store, restored) - restored.refused
    if as_json:
        print_json({"store": str(place), "file": str(archive), **_fields(restored)})
    else:
        _tell_restored(restored)
    return 0 if restored.is_whole and not restored.refused and not restored.evicted else 1


def _check_readable(store: Opened) -> None:
    """Raises InputError where blocks can be listed, but nothing asked for would be found."""
    if store.renames_keys:
        raise InputError(
            "a tenant behind a token cannot export: its keys are the daemon's own; "
            "export through the socket on its machine"
        )


def _make(path: Path, settings: Settings) -> None:
    """A new directory, as the settings say. Raises InputError where that cannot be."""
    from kvstore import compose

    nvme = settings.nvme.model_copy(update={"path": path})
    compose.open(settings.model_copy(update={"nvme": nvme})).close()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes its place when all went well, and is gone otherwise."""
    try:
        if str(path) == "-":
            raise InputError("a file is needed, not a pipe: it appears when it is complete")
        if path.is_dir():
            raise InputError(f"{path} is a folder: name a file in it")
        if path.exists() and not path.is_file():
            raise InputError(f"{path} is no ordinary file, and cannot be replaced by one")
        with tempfile.NamedTemporaryFile(
            "wb", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            try:
                yield file.file  # type: ignore[misc]  # typeshed knows less of it than it is
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    try:
        file = open(path, "rb")  # noqa: SIM115  the errors of opening it are told apart
        if not file.seekable():
            raise InputError(f"{path}: a file is needed, not a pipe")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        yield file


@contextlib.contextmanager
def _answering(store: Opened) -> Iterator[None]:
    """A daemon that goes away is told from a tier that fails."""
    try:
        yield
    except TierError:
        if store.client is not None:
            store.client.check_connected()
        raise


def _left_in_ram(store: Opened, restored: Restored) -> int:
    """Blocks that are not in the directory, and gone when it is closed."""
    from kvstore.frame import names
    from kvstore.inventory import listing

    written = set(names(listing(store.inventory, "nvme")["key"]))
    return sum(key not in written for key in restored.keys)


def _tell_saved(archive: Path, saved: Saved) -> None:
    from kvstore.cli.console import show

    show(f"{counted(saved.blocks, 'block')}, {format_size(saved.nbytes)}: {archive}\n")
    if saved.missed:
        show(f"{_reasons(saved)}\n")


def _reasons(saved: Saved) -> str:
    """What was listed, but could not be read."""
    return ", ".join(
        f"{counted(count, 'block')} listed, but not to be had: {reason}"
        for reason, count in saved.missed.items()
    )


def _tell_restored(restored: Restored) -> None:
    from kvstore.cli.console import show

    show(f"{counted(restored.blocks, 'new block')}, {restored.present} there already\n")
    for damage in restored.damage[:SHOWN_DAMAGE]:
        show(f"damaged at offset {damage.start}: {damage.problem}\n")
    if len(restored.damage) > SHOWN_DAMAGE:
        show(f"and at {len(restored.damage) - SHOWN_DAMAGE} more places; --json has them all\n")
    if restored.promised is None:
        show("the file is cut off: nobody knows how many blocks are missing at its end\n")
    elif restored.lost:
        show(f"{restored.lost} of the file's {counted(restored.promised, 'block')} lost\n")
    if restored.refused:
        show(f"{counted(restored.refused, 'block')} refused: the store has no room\n")
    if restored.evicted:
        blocks = counted(restored.evicted, "block")
        show(f"{blocks} had to make room for others: the store is too small\n")


def _fields(restored: Restored) -> dict[str, Any]:
    return {
        "blocks": restored.blocks,
        "present": restored.present,
        "refused": restored.refused,
        "evicted": restored.evicted,
        "promised": restored.promised,
        "lost": restored.lost,
        "damage": [{"offset": each.start, "problem": each.problem} for each in restored.damage],
        "ok": restored.is_whole and not restored.refused and not restored.evicted,
    }

"""Where the store is that a command is about: an NVMe directory, or a running daemon."""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from kvstore.cli.options import settings_options
from kvstore.errors import InputError, RightsError

if TYPE_CHECKING:
    from kvstore.client.client import StoreClient
    from kvstore.inventory import Inventory
    from kvstore.settings import Settings
    from kvstore.verbs import Store

WHICH = """DIR is an NVMe directory that no process is using, URL a running daemon. Without
    either it is the daemon of the settings (engine.store) or of the usual socket, if one
    runs there, and otherwise the directory of the settings (nvme.path)."""


class Place(NamedTuple):
    """A daemon's URL, or else a directory."""

    url: str | None
    directory: Path | None = None

    def __str__(self) -> str:
        return self.url or str(self.directory)

    @property
    def path(self) -> Path:
        """The directory. Raises InputError for a daemon."""
        if self.directory is None:
            raise InputError("this looks into a directory: give DIR")
        return self.directory


class Opened(NamedTuple):
    """A store to work on, wherever it is. `client` is None for a directory."""

    store: Store
    inventory: Inventory
    client: StoreClient | None

    @property
    def renames_keys(self) -> bool:
        """Whether what is asked for has other names there: a daemon's, for who has a token."""
        if self.client is None:
            return False
        from kvstore.client.inventory import ClientInventory

        try:
            return bool(ClientInventory(self.client).status().get("renames_keys"))
        except RightsError:  # without a token everything is allowed
            return True


_directory = click.argument(
    "directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path, readable=False)
)
_store = click.option("--store", metavar="URL", help="A running daemon, such as unix:///path.")


def daemon_options(*keys: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command `--store` and the flags of `keys`; it receives `place` and `settings`."""
    return _options(keys, with_directory=False)


def place_options(*keys: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As `daemon_options`, and [DIR]. The command's help says `WHICH` they mean."""
    return _options(keys, with_directory=True)


def _options(
    keys: tuple[str, ...], *, with_directory: bool
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_place(*args: Any, settings: Settings, store: str | None, **options: Any) -> Any:
            directory = options.pop("directory", None)
            place = choose(directory, store, settings)
            if not with_directory and (place is None or place.url is None):
                raise InputError("no daemon is running here: give its URL as --store")
            if place is None:
                raise InputError(
                    "which store? give DIR, or the URL of a daemon as --store; none is running here"
                )
            return command(*args, place=place, settings=settings, **options)

        decorated = _store(settings_options(*keys)(with_place))
        return _directory(decorated) if with_directory else decorated

    return decorate


def choose(directory: Path | None, store: str | None, settings: Settings) -> Place | None:
    """What was asked for, or what is running, or what the settings name, if anything.

    Raises InputError for what cannot be.
    """
    if directory is not None and store is not None:
        raise InputError("DIR and --store do not go together: a daemon has its own directory")
    if directory is not None:
        return Place(None, directory)
    if store is not None or settings.engine.store is not None:
        from kvstore.client.address import parse

        return Place(str(parse(store if store is not None else settings.engine.store or "")))
    running = _running_daemon(settings)
    if running is not None:
        return Place(f"unix://{running}")
    return None if settings.nvme.path is None else Place(None, settings.nvme.path)


def _running_daemon(settings: Settings) -> Path | None:
    """The socket where `kvstore daemon` would be, if someone listens there."""
    from kvstore.daemon.socket_path import socket_of
    from kvstore.errors import DirectoryError

    with (
        suppress(DirectoryError, OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe,
    ):
        path = socket_of(settings)
        probe.connect(os.fspath(path))
        return path
    return None


@contextmanager
def opened(place: Place, settings: Settings) -> Iterator[Opened]:
    """The store at `place`, for as long as a command works on it.

    A directory is opened as large as it is; nobody else may be using it. Raises
    ConnectionLostError where no daemon answers, and InputError for what a person can mend.
    """
    from kvstore import compose

    if place.url is None:
        with compose.open_directory(place.path, settings) as store:
            yield Opened(store, store.inventory, None)
        return
    with connected(place, settings) as client:
        from kvstore.client.inventory import ClientInventory

        yield Opened(client, ClientInventory(client), client)


@contextmanager
def connected(place: Place, settings: Settings) -> Iterator[StoreClient]:
    """A client of the daemon, which must answer: the commands end without it, and say so."""
    from kvstore import compose

    # The client goes on without its daemon, and tells so; a command does neither.
    logger = logging.getLogger("kvstore.client")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with compose.connect_to(str(place), settings) as client:
            client.check_connected()
            yield client
    finally:
        logger.setLevel(level)

"""Where a daemon is: `unix:///run/kvstore/kvstore.sock`, `kvstore://host:port`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from kvstore.errors import SettingsError

DATA_PORT = 7420


class Address(NamedTuple):
    """A socket's path, or a host and port."""

    path: Path | None
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return f"unix://{self.path}" if self.path else f"kvstore://{self.host}:{self.port}"


def parse(url: str) -> Address:
    """Raises SettingsError for anything that names no daemon."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise _refused(url, f" ({error})") from None
    extra = parts.username or parts.password or parts.query or parts.fragment
    if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/") and not extra:
        return Address(Path(parts.path))
    if parts.scheme == "kvstore" and parts.hostname and parts.path in ("", "/") and not extra:
        return Address(None, parts.hostname, DATA_PORT if port is None else port)
    is_relative = bool(parts.netloc) or not parts.path.startswith("/")
    if parts.scheme == "unix" and is_relative:
        raise _refused(url, " (the path must be absolute)")
    raise _refused(url)


def _refused(url: str, why: str = "") -> SettingsError:
    return SettingsError(
        f"{url!r} names no daemon{why}: give unix:///path/to/socket or kvstore://host:port"
    )

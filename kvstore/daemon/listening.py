"""Where a TCP door listens: "127.0.0.1:7420", "[::1]:7420"."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from typing import NamedTuple

from kvstore.errors import SettingsError


class Endpoint(NamedTuple):
    """`host` is "" for all addresses; port 0 lets the kernel choose."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_endpoint(text: str, origin: str) -> Endpoint:
    """Raises SettingsError, which begins with `origin`, the name of the setting."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f"{origin} = {text!r}: must be HOST:PORT, such as 127.0.0.1:7420")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise SettingsError(f"{origin} = {text!r}: write an IPv6 address in brackets: [::1]:7420")
    return Endpoint(host, int(port))


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine reach that host, whatever it resolves to."""
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)

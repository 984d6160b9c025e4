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
    if not colon or not port.isascii() or not port.isdigit():
        raise SettingsError(f"{origin} = {text!r}: must be HOST:PORT, such as 127.0.0.1:7420")
    if len(port) > 5 or int(port) > 65535:
        raise SettingsError(f"{origin} = {text!r}: the port is too large: at most 65535")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise SettingsError(f"{origin} = {text!r}: write an IPv6 address in brackets: [::1]:7420")
    return Endpoint(host, int(port))


def listen(endpoint: Endpoint, origin: str) -> list[socket.socket]:
    """Sockets that listen on every address of the host, and do not block.

    Raises SettingsError where that cannot be.
    """
    listening: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(
            endpoint.host or None,
            endpoint.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
        for family, address in dict.fromkeys((family, address) for family, *_, address in found):
            sock = socket.create_server(address[:2], family=family, backlog=128)
            sock.setblocking(False)
            listening.append(sock)
    except (OSError, UnicodeError) as error:
        for sock in listening:
            sock.close()
        why = getattr(error, "strerror", None) or error
        raise SettingsError(f"{origin} = {endpoint}: cannot be listened on: {why}") from None
    return listening


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine reach that host, whatever it resolves to."""
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return all(ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)

"""The first message on every connection."""

from __future__ import annotations

from kvstore import wire
from kvstore.errors import WireError

HELLO_S = 5.0  # a client that has not said hello by then is sent away


def understood(body: bytes) -> wire.Hello:
    """The hello in a frame. Raises WireError for what is none, or of another version."""
    request = wire.decode_request(body)
    if not isinstance(request, wire.Hello):
        raise WireError("the first message must be a hello")
    if request.version != wire.VERSION:
        raise WireError(
            f"protocol version {request.version} is not spoken here, but {wire.VERSION}: "
            "install the same kvstore on both sides"
        )
    return request

"""Who a client is to the daemon: whose blocks it may find, and what it may do.

A tenant's blocks are told apart by a secret of the server's, never by anything that a
client says. Its namespaces get a salt made from the secret, and every key it sends is
hashed with it before the store sees it. So a client that knows another tenant's keys, or
lies about its salt, still names only blocks of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from typing import Literal

from kvstore.hashing import KEY_BYTES, Chain, Key
from kvstore.identity import Namespace
from kvstore.retention import DEFAULT_PRIORITY, MAX_PRIORITY, Retention

Right = Literal["read", "write", "admin"]
RIGHTS: tuple[Right, ...] = ("read", "write", "admin")
MARK_CHARACTERS = 16  # with which the salts of a tenant's namespaces begin


@dataclass(frozen=True, slots=True)
class Tenant:
    """`secret` is b"" for whoever shares the machine's user: keys and salts stay as they are."""

    name: str
    rights: frozenset[Right] = frozenset(RIGHTS)
    secret: bytes = field(default=b"", repr=False)
    quota_bytes: int | None = None  # of blocks, over RAM and NVMe; None: no limit of its own
    priority_cap: int = MAX_PRIORITY

    @property
    def mark(self) -> str:
        """What the salts of this tenant's namespaces begin with, and of nobody else's."""
        if not self.secret:
            return ""
        return hashlib.sha256(self.secret + b"mark").hexdigest()[:MARK_CHARACTERS]

    def namespace(self, asked: Namespace) -> Namespace:
        """What the store knows a client's namespace as."""
        if not self.secret:
            return asked
        salt = hashlib.sha256(self.secret + b"salt" + asked.salt.encode("utf-8", "surrogatepass"))
        return dataclasses.replace(asked, salt=self.mark + salt.hexdigest()[:32])

    def owns(self, namespace: Namespace) -> bool:
        """Whether one that the store knows is this tenant's; all are, to one without a secret."""
        return namespace.salt.startswith(self.mark)

    def chain(self, asked: Namespace, own: Namespace, parent: Key, keys: tuple[Key, ...]) -> Chain:
        """What the store knows a client's chain as; `own` is `namespace(asked)`."""
        if not self.secret:
            return Chain(own, parent, keys)
        start = hashlib.sha256(self.secret + b"key")
        mapped = []
        for key in (parent, *keys):
            digest = start.copy()
            digest.update(key)
            mapped.append(digest.digest()[:KEY_BYTES])
        first = own.fingerprint if parent == asked.fingerprint else mapped[0]
        return Chain(own, first, tuple(mapped[1:]))

    def retention(self, asked: Retention) -> Retention:
        """What is granted: no more than the cap, neither now nor when the time is over."""
        ttl_s = asked.ttl_s if self.priority_cap >= DEFAULT_PRIORITY else None
        return Retention(min(asked.priority, self.priority_cap), ttl_s)


LOCAL = Tenant("local")
"""Who comes through the socket that only this user can open."""

"""What a daemon holds, and how it fares: for those who run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvstore import wire
from kvstore.client.client import StoreClient
from kvstore.errors import WireError
from kvstore.frame import RECORD_DTYPE
from kvstore.hashing import Key
from kvstore.identity import Namespace
from kvstore.inventory import Page
from kvstore.tier import Checked


class ClientInventory:
    """See `kvstore.inventory.Inventory`. Needs the right to administer, which the local door gives.

    Every method asks the daemon, and raises ConnectionLostError where it is away.
    """

    def __init__(self, client: StoreClient) -> None:
        """The client is borrowed."""
        self._client = client

    def namespaces(self) -> dict[bytes, Namespace]:
        records = self._client.ask(wire.ListNamespaces).fields["namespaces"]
        return {bytes.fromhex(name): namespace(text) for name, text in records.items()}

    def tiers(self) -> list[str]:
        return list(self._client.ask(wire.ListNamespaces).fields["tiers"])

    def page(self, tier: str, start: int = 0) -> Page:
        listed = self._client.ask(wire.ListBlocks, tier=tier, start=start)
        if len(listed.rows) % RECORD_DTYPE.itemsize:
            raise WireError("the daemon lists blocks in a form that is not known here")
        return Page(np.frombuffer(listed.rows, RECORD_DTYPE), listed.following)

    def evict(self, keys: Sequence[Key]) -> int:
        return int(self._client.ask(wire.EvictBlocks, keys=wire.pack_keys(keys)).count)

    def check(self, keys: Sequence[Key]) -> Checked:
        """At most `wire.CHECKED_KEYS` at once; so many bytes that the answer is there in time."""
        fields = self._client.ask(wire.CheckBlocks, keys=wire.pack_keys(keys)).fields
        damaged = list(wire.unpack_keys(fields["damaged"]))
        return Checked(fields["blocks"], fields["stored_bytes"], damaged)

    def status(self) -> Mapping[str, Any]:
        """The daemon's process, its clients, and the blocks of each namespace."""
        fields: Mapping[str, Any] = self._client.ask(wire.GetStatus).fields
        return fields


def namespace(record: str) -> Namespace:
    """Raises WireError for a record that a daemon of this version would not send."""
    try:
        return Namespace.from_json(record)
    except ValueError as error:
        raise WireError(f"the daemon names a namespace that is none: {error}") from error

"""What an operator asks of a daemon over its doors: what it holds, and what is to go."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Sequence
from typing import Any

from kvstore import wire
from kvstore.daemon.service import Service
from kvstore.daemon.session import Session
from kvstore.hashing import Key
from kvstore.tier import Checked
from kvstore.version import __version__

CHECKED_BYTES_PER_S = 256 << 20  # of all who have blocks checked, so that the drive serves others


class InventoryVerbs:
    """The verbs of `kvstore.inventory.Inventory` for one client, who must be an administrator.

    Belongs to the event loop's thread; what takes time runs in others. Every verb raises
    RightsError for those who may not.
    """

    def __init__(self, service: Service, session: Session) -> None:
        self._service = service
        self._session = session
        self._inventory = service.store.inventory

    def answer(self, request: wire.InventoryRequest) -> wire.Reply | Awaitable[wire.Reply]:
        """The reply, or something to await for it."""
        self._session.check_right("admin")
        match request:
            case wire.ListNamespaces(seq):
                return wire.Answered(seq, self.namespaces())
            case wire.ListBlocks(seq, tier, start):
                page = self._inventory.page(tier, start)
                return wire.Listed(seq, page.rows.tobytes(), page.following)
            case wire.EvictBlocks(seq, keys):
                return wire.Counted(seq, self._inventory.evict(wire.unpack_keys(keys)))
            case wire.CheckBlocks(seq, keys):
                return self._check(seq, wire.unpack_keys(keys))
            case wire.GetStatus(seq):
                return self._status(seq)

    def namespaces(self) -> dict[str, Any]:
        known = self._inventory.namespaces()
        records = {name.hex(): namespace.to_json() for name, namespace in known.items()}
        return {"tiers": self._inventory.tiers(), "namespaces": records}

    async def check(self, keys: Sequence[Key]) -> Checked:
        """Waits until those who asked before have had their turn, and for the pace's sake."""
        async with self._service.checking:
            began_s = time.monotonic()
            checked = await asyncio.to_thread(self._inventory.check, keys)
            took_s = time.monotonic() - began_s
            await asyncio.sleep(max(0.0, checked.stored_bytes / CHECKED_BYTES_PER_S - took_s))
        return checked

    async def _check(self, seq: int, keys: Sequence[Key]) -> wire.Reply:
        checked = await self.check(keys)
        fields = {**checked._asdict(), "damaged": wire.pack_keys(checked.damaged)}
        return wire.Answered(seq, fields)

    async def _status(self, seq: int) -> wire.Reply:
        usage = await asyncio.to_thread(self._service.store.usage)
        return wire.Answered(
            seq,
            {
                "version": __version__,
                "pid": os.getpid(),
                "uptime_s": time.monotonic() - self._service.started_s,
                "renames_keys": bool(self._session.tenant.secret),
                "sessions": [_session(each) for each in self._service.sessions],
                "namespaces": [
                    {
                        "fingerprint": each.namespace.fingerprint.hex(),
                        "record": each.namespace.to_json(),
                        "tenant": self._service.owner(each.namespace),
                        "blocks": dict(each.blocks),
                        "nbytes": dict(each.nbytes),
                    }
                    for each in usage
                    if each.blocks
                ],
            },
        )


def _session(session: Session) -> dict[str, Any]:
    return {
        "peer": session.peer,
        "tenant": session.tenant.name,
        "leases": len(session.leases),
        "reservations": len(session.reservations),
        "in_flight_bytes": session.in_flight_bytes,
    }

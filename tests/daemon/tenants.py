"""Tenants of one daemon: one with blocks worth stealing, one who would, and those between."""

from __future__ import annotations

from typing import Any

from kvstore.daemon.tokens import Tenants, TokenRecord, digest_of
from kvstore.hashing import Chain
from kvstore.tenant import Right
from tests.store.rig import BLOCK, Rig

VICTIM, THIEF, READER, OPERATOR = "kvs_victim", "kvs_thief", "kvs_reader", "kvs_operator"
OVERSEER = "kvs_overseer"
QUOTA_BLOCKS, CAP = 10, 40
SECRET = bytes(range(32))


def record(token: str, tenant: str, *rights: Right, **limits: Any) -> TokenRecord:
    given = {"quota_bytes": None, "priority_cap": 100, **limits}
    return TokenRecord(digest_of(token), tenant, frozenset(rights), **given)


TENANTS = Tenants(
    [
        record(VICTIM, "victim", "read", "write"),
        record(READER, "victim", "read"),
        record(THIEF, "thief", "read", "write", quota_bytes=QUOTA_BLOCKS * BLOCK, priority_cap=CAP),
        record(OPERATOR, "operator", "read", "write", "admin"),
        record(OVERSEER, "overseer", "admin"),
    ],
    SECRET,
)
VICTIMS, THIEFS = TENANTS.of(VICTIM), TENANTS.of(THIEF)


def as_stored(blocks: Chain) -> Chain:
    """What the store knows the victim's chain as; a secret of the daemon's goes into it."""
    own = VICTIMS.namespace(blocks.namespace)
    return VICTIMS.chain(blocks.namespace, own, blocks.parent, blocks.keys)


def held_by(rig: Rig, blocks: Chain) -> int:
    """How many of a tenant's blocks, as it names them, the store has: only the thief's."""
    own = THIEFS.namespace(blocks.namespace)
    there = rig.store.probe(THIEFS.chain(blocks.namespace, own, blocks.parent, blocks.keys))
    return len(blocks) - there.tiers.count(None)

"""What a store holds, as the commands show it: namespaces, chains, blocks."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore.chains import walk
from kvstore.errors import InputError
from kvstore.frame import CODEC_NUMBERS, names
from kvstore.hashing import Key
from kvstore.identity import Namespace
from kvstore.inventory import Inventory, listing
from kvstore.tiers.nvme_verify import DirectorySummary

_CODECS = {number: name for name, number in CODEC_NUMBERS.items()}
LEAST_PREFIX = 4  # hexadecimal digits of a namespace's name that must be given


class Held(NamedTuple):
    """Every block once: `rows` [n] of `frame.RECORD_DTYPE`, and the tiers that hold each."""

    rows: NDArray[np.void]
    tiers: list[tuple[str, ...]]


@dataclass(frozen=True)
class Listing:
    """The tables of a store's tiers, the fastest first, and the namespaces that are known."""

    namespaces: Mapping[bytes, Namespace]
    tables: Mapping[str, NDArray[np.void]]

    @classmethod
    def of(cls, inventory: Inventory) -> Listing:
        """Of a store in use: row by row true, not as a whole."""
        tables = {tier: listing(inventory, tier) for tier in inventory.tiers()}
        return cls(inventory.namespaces(), tables)

    @classmethod
    def of_directory(cls, summary: DirectorySummary) -> Listing:
        known = {n.fingerprint: n.namespace for n in summary.namespaces if n.namespace}
        return cls(known, {"nvme": summary.records})

    def fingerprints(self) -> list[bytes]:
        """Of the namespaces that are known, and of those that only have blocks."""
        seen = set(self.namespaces)
        for table in self.tables.values():
            seen.update(names(distinct(table["namespace"])))
        return sorted(seen)

    def only(self, fingerprints: Collection[bytes]) -> Listing:
        """Those namespaces alone."""
        tables = {tier: rows[owned(rows, fingerprints)] for tier, rows in self.tables.items()}
        known = {name: each for name, each in self.namespaces.items() if name in fingerprints}
        return Listing(known, tables)

    @cached_property
    def held(self) -> Held:
        """Each block once: the record of its slowest tier, which says most, used when it last was
        used anywhere, as firmly kept as it is anywhere.
        """
        places: dict[Key, int] = {}
        parts: list[NDArray[np.void]] = []
        tiers: list[tuple[str, ...]] = []
        for tier, table in reversed(list(self.tables.items())):
            found = [places.setdefault(key, len(places)) for key in names(table["key"])]
            known = np.array([place < len(tiers) for place in found], dtype=bool)
            rows = np.concatenate([*parts, table[~known]])
            both = [place for place in found if place < len(tiers)]
            for name in ("last_use_s", "priority"):
                rows[name][both] = np.maximum(rows[name][both], table[name][known])
            for place in both:
                tiers[place] = (tier, *tiers[place])
            tiers += [(tier,)] * int(np.count_nonzero(~known))
            parts = [rows]
        return Held(parts[0], tiers)

    def model(self, fingerprint: bytes) -> str | None:
        known = self.namespaces.get(fingerprint)
        return known.model if known else None


def by_namespace(listing: Listing) -> list[dict[str, Any]]:
    """What each namespace holds, the one that holds most first."""
    held = listing.held.rows
    summaries = []
    for fingerprint in listing.fingerprints():
        rows = held[owned(held, {fingerprint})]
        known = listing.namespaces.get(fingerprint)
        tiers = {}
        for tier, table in listing.tables.items():
            stored = table["stored_bytes"][owned(table, {fingerprint})]
            tiers[tier] = {"blocks": len(stored), "stored_bytes": int(stored.sum())}
        summaries.append(
            {
                "fingerprint": fingerprint.hex(),
                "model": known.model if known else None,
                "namespace": dataclasses.asdict(known) if known else None,
                "blocks": len(rows),
                "tokens": known.block_tokens * len(rows) if known else None,
                "raw_bytes": int(rows["raw_bytes"].sum()),
                "tiers": tiers,
                "last_use_s": float(rows["last_use_s"].max()) if len(rows) else None,
            }
        )
    return sorted(summaries, key=lambda each: each["raw_bytes"], reverse=True)


def by_chain(listing: Listing) -> list[dict[str, Any]]:
    """Blocks by the first of their prompts that is held, the latest used first."""
    rows = listing.held.rows
    keys = names(rows["key"])
    places = {key: place for place, key in enumerate(keys)}
    nbytes, used_s = rows["raw_bytes"].tolist(), rows["last_use_s"].tolist()
    found: dict[Key, dict[str, Any]] = {}
    for key, head, depth in walk(dict(zip(keys, names(rows["parent"]), strict=True))):
        place = places[key]
        if depth == 0:
            owner, parent = rows[place]["namespace"].item(), rows[place]["parent"].item()
            found[head] = {
                "head": head.hex(),
                "namespace": owner.hex(),
                "model": listing.model(owner),
                "starts_a_prompt": parent == owner,
                "blocks": 0,
                "length": 0,
                "raw_bytes": 0,
                "last_use_s": 0.0,
            }
        chain = found[head]
        chain["blocks"] += 1
        chain["length"] = max(chain["length"], depth + 1)
        chain["raw_bytes"] += nbytes[place]
        chain["last_use_s"] = max(chain["last_use_s"], used_s[place])
    return sorted(found.values(), key=lambda chain: chain["last_use_s"], reverse=True)


def by_block(listing: Listing) -> Iterator[dict[str, Any]]:
    """Every block, the latest used first."""
    rows, tiers = listing.held
    for place in rows["last_use_s"].argsort(kind="stable")[::-1].tolist():
        record = rows[place]
        owner = record["namespace"].item()
        is_below = "nvme" in tiers[place]
        yield {
            "key": record["key"].item().hex(),
            "parent": record["parent"].item().hex(),
            "namespace": owner.hex(),
            "model": listing.model(owner),
            "tiers": list(tiers[place]),
            "offset": int(record["offset"]) if is_below else None,
            "codec": _CODECS[int(record["codec"])],
            "raw_bytes": int(record["raw_bytes"]),
            "stored_bytes": int(record["stored_bytes"]),
            "priority": int(record["priority"]),
            "created_s": float(record["created_s"]) or None,
            "last_use_s": float(record["last_use_s"]),
            "expires_s": float(record["expires_s"]) or None,
        }


def named(prefix: str, fingerprints: Collection[bytes]) -> bytes:
    """The namespace whose name begins so. Raises InputError unless it is exactly one."""
    digits = prefix.lower()
    if len(digits) < LEAST_PREFIX or not set(digits) <= set(string.hexdigits):
        raise InputError(
            f"--namespace {prefix}: give the {LEAST_PREFIX} or more hexadecimal digits with which "
            "its name begins; `kvstore ls` shows the names"
        )
    found = [name for name in fingerprints if name.hex().startswith(digits)]
    if len(found) != 1:
        many = f"{len(found)} namespaces begin so; give more digits" if found else "there is none"
        raise InputError(f"--namespace {prefix}: {many}; `kvstore ls` shows the names")
    return found[0]


def keyed(listing: Listing, keys: Collection[Key]) -> Listing:
    """The blocks of these keys alone."""
    tables = {
        tier: rows[np.array([key in keys for key in names(rows["key"])], dtype=bool)]
        for tier, rows in listing.tables.items()
    }
    return Listing(listing.namespaces, tables)


def owned(rows: NDArray[np.void], fingerprints: Collection[bytes]) -> NDArray[np.bool_]:
    """Which rows are of one of these namespaces."""
    mask = np.zeros(len(rows), dtype=bool)
    for fingerprint in fingerprints:
        mask |= rows["namespace"] == np.void(fingerprint)
    return mask


def distinct(column: NDArray[np.void]) -> NDArray[np.void]:
    """The different names in a column."""
    return np.unique(np.ascontiguousarray(column).view("<u8").reshape(-1, 2), axis=0).view("V16")[
        :, 0
    ]

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
from kvstore.frame import CODEC_NUMBERS, RECORD_DTYPE, names
from kvstore.hashing import Key
from kvstore.identity import Namespace
from kvstore.inventory import Inventory, listing
from kvstore.tiers.nvme_verify import DirectorySummary

_CODECS = {number: name for name, number in CODEC_NUMBERS.items()}
STEP_ROWS = 8192  # made into Python's values at once
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
            seen.update(names(table["namespace"]))
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
    """What each namespace holds that holds anything, the one that holds most first."""
    held = listing.held.rows
    summaries = []
    for fingerprint in listing.fingerprints():
        rows = held[owned(held, {fingerprint})]
        if not len(rows):
            continue
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
                "last_use_s": float(rows["last_use_s"].max()),
            }
        )
    return sorted(summaries, key=lambda each: each["raw_bytes"], reverse=True)


def by_chain(listing: Listing) -> list[dict[str, Any]]:
    """Blocks by the first of their prompts that is held, the latest used first."""
    rows = listing.held.rows
    keys = names(rows["key"])
    places = {key: place for place, key in enumerate(keys)}
    heads: list[int] = []  # places
    head_of, depths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for key, _, depth in walk(dict(zip(keys, names(rows["parent"]), strict=True))):
        place = places[key]
        if depth == 0:  # what follows stands under it
            heads.append(place)
        head_of[place], depths[place] = len(heads) - 1, depth
    blocks = np.bincount(head_of, minlength=len(heads))
    nbytes = np.bincount(head_of, rows["raw_bytes"], len(heads))
    lengths, used_s = np.zeros(len(heads), np.int64), np.zeros(len(heads))
    np.maximum.at(lengths, head_of, depths + 1)
    np.maximum.at(used_s, head_of, rows["last_use_s"])
    chains = []
    for number in used_s.argsort(kind="stable")[::-1].tolist():
        first = rows[heads[number]]
        owner = first["namespace"].item()
        chains.append(
            {
                "head": first["key"].item().hex(),
                "namespace": owner.hex(),
                "model": listing.model(owner),
                "starts_a_prompt": first["parent"].item() == owner,
                "blocks": int(blocks[number]),
                "length": int(lengths[number]),
                "raw_bytes": int(nbytes[number]),
                "last_use_s": float(used_s[number]),
            }
        )
    return chains


def by_block(listing: Listing) -> Iterator[dict[str, Any]]:
    """Every block, the latest used first."""
    rows, tiers = listing.held
    models = {name: each.model for name, each in listing.namespaces.items()}
    order = rows["last_use_s"].argsort(kind="stable")[::-1]
    for start in range(0, len(order), STEP_ROWS):
        part = order[start : start + STEP_ROWS]
        for place, values in zip(part.tolist(), rows[part].tolist(), strict=True):
            record = dict(zip(RECORD_DTYPE.names or (), values, strict=True))
            yield {
                "key": record["key"].hex(),
                "parent": record["parent"].hex(),
                "namespace": record["namespace"].hex(),
                "model": models.get(record["namespace"]),
                "tiers": list(tiers[place]),
                "offset": record["offset"] if "nvme" in tiers[place] else None,
                "codec": _CODECS[record["codec"]],
                "raw_bytes": record["raw_bytes"],
                "stored_bytes": record["stored_bytes"],
                "priority": record["priority"],
                "created_s": record["created_s"] or None,
                "last_use_s": record["last_use_s"],
                "expires_s": record["expires_s"] or None,
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
    column = _halves(rows["namespace"])
    mask = np.zeros(len(rows), dtype=bool)
    for fingerprint in fingerprints:
        mask |= (column == np.frombuffer(fingerprint, "<u8")).all(axis=1)
    return mask


def _halves(column: NDArray[np.void]) -> NDArray[np.uint64]:
    """16-byte names as two numbers each, [n, 2]: numpy compares those fast."""
    return np.ascontiguousarray(column).view("<u8").reshape(-1, 2)

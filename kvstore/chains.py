"""Blocks as the trees that they form: a block stands under the one before it in its prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from kvstore.hashing import Key


class Place(NamedTuple):
    """Where a block stands: `depth` blocks below `head`, the first that is there."""

    key: Key
    head: Key
    depth: int


def walk(parents: Mapping[Key, Key]) -> Iterator[Place]:
    """All blocks, each after its parent, and directly after it where it can be.

    `parents` says for each block which one is before it; heads are those whose parent is
    not among them. Blocks that are their own ancestors, which no hash gives, are left out.
    """
    children: defaultdict[Key, list[Key]] = defaultdict(list)
    heads = []
    for key, parent in parents.items():
        if parent in parents:
            children[parent].append(key)
        else:
            heads.append(key)
    for head in heads:
        left = [(head, 0)]
        while left:
            key, depth = left.pop()
            yield Place(key, head, depth)
            left += [(child, depth + 1) for child in children.get(key, ())]

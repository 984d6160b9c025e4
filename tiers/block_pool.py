"""Which physical block of HBM belongs to whom: free list, reference counts, keys, holds.

A block that nobody references is free; it keeps its key, and can be found again,
until it is taken for something else. Unless it is held: a copy from or to it is on its
way, and until that has arrived its memory is nobody's to write to. Pure and
single-threaded: it belongs to the engine's loop, and holds no bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import InvariantError
from kvstore.hashing import Key

# Blocks that lose their keys together when no empty one is left. More than are
# needed at once, so that a sequence that grows by single blocks finds neighbours.
FORGET_BLOCKS = 8


class BlockPool:
    """Reference counts and keys of `blocks` physical blocks, numbered from 0.

    A block is in exactly one of four places: in use (references > 0), held (no
    references, but a copy is on its way), cached (free, but it has a key), or empty
    (free, no key). One that is held or cached can be found and shared by its key.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._references = [0] * blocks
        self._holds = [0] * blocks
        self.held_blocks = 0  # that nobody references: free as soon as their copies are over
        self._keys: list[Key | None] = [None] * blocks
        self._by_key: dict[Key, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # the next to be forgotten first
        self._empty: NDArray[np.bool_] = np.ones(blocks, dtype=np.bool_)
        self._empty_blocks = blocks

    @property
    def free_blocks(self) -> int:
        """Blocks that `take` could hand out now: empty or cached."""
        return self._empty_blocks + len(self._cached)

    @property
    def cached_blocks(self) -> int:
        return len(self._cached)

    @property
    def used_blocks(self) -> int:
        """In use or held."""
        return self.blocks - self.free_blocks

    def references(self, block: int) -> int:
        return self._references[block]

    def is_cached(self, block: int) -> bool:
        return block in self._cached

    def is_held(self, block: int) -> bool:
        return self._holds[block] > 0

    def key(self, block: int) -> Key | None:
        return self._keys[block]

    def find(self, keys: Sequence[Key]) -> list[int]:
        """Blocks of the leading `keys` that are here, free or not. No side effect."""
        found: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """One reference more for each; a cached or held block comes into use again."""
        for block in blocks:
            if not self._references[block]:
                if self._keys[block] is None:
                    raise InvariantError(f"block {block} is shared, but nobody knows its content")
                if self._holds[block]:
                    self.held_blocks -= 1
                else:
                    del self._cached[block]
            self._references[block] += 1

    def take(self, count: int, after: int | None = None) -> list[int]:
        """`count` blocks of undefined content with one reference each; all of them or [].

        Physically contiguous as far as possible: directly behind block `after`
        first, then in the largest run of empty blocks. Cached blocks are
        forgotten only when there are not enough empty ones.
        """
        if count > self.free_blocks:
            return []
        if count > self._empty_blocks:
            self._forget(max(count - self._empty_blocks, min(FORGET_BLOCKS, len(self._cached))))
        taken: list[int] = []
        if after is not None:
            stop = after + 1
            while len(taken) < count and stop < self.blocks and self._empty[stop]:
                taken.append(stop)
                stop += 1
            self._use(taken)
        while len(taken) < count:
            run = self._place(count - len(taken))
            self._use(run)
            taken.extend(run)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less for each of a chain's `blocks`, which are in the chain's order.

        Blocks that become free with a key are forgotten before any that became
        free later, and the deepest of these first: nothing can be reached
        through a chain whose front is gone.
        """
        for block in reversed(blocks):
            references = self._references[block]
            if references < 1:
                raise InvariantError(f"block {block} is released more often than it was taken")
            self._references[block] = references - 1
            if references > 1:
                continue
            if self._holds[block]:
                self.held_blocks += 1
            else:
                self._free(block)

    def hold(self, blocks: Sequence[int]) -> None:
        """A copy from or to each of `blocks`, all in use, begins: not to be taken until `unhold`.

        Whoever references them may release them meanwhile.
        """
        for block in blocks:
            if not self._references[block]:
                raise InvariantError(f"block {block} is held, but nobody uses it")
            self._holds[block] += 1

    def unhold(self, blocks: Sequence[int]) -> None:
        """That copy is over. Blocks that nobody references any more become free, as in `release`.

        `blocks` are in the chain's order.
        """
        for block in reversed(blocks):
            if self._holds[block] < 1:
                raise InvariantError(f"block {block} is not held")
            self._holds[block] -= 1
            if not self._holds[block] and not self._references[block]:
                self.held_blocks -= 1
                self._free(block)

    def name(self, block: int, key: Key) -> None:
        """The content of `block`, which is in use, is final from now on and known as `key`.

        Where another block has that key already, this one stays without.
        """
        if not self._references[block] or self._keys[block] is not None:
            raise InvariantError(f"block {block} cannot be named: it is free or has a key")
        if key not in self._by_key:
            self._by_key[key] = block
            self._keys[block] = key

    def clear(self) -> int:
        """Forget every block that nobody uses; those in use keep their keys. Returns how many."""
        count = len(self._cached)
        self._forget(count)
        if self.held_blocks:
            held = [b for b in self._by_key.values() if not self._references[b]]
            for block in held:
                self._unname(block)
            count += len(held)
        return count

    def _free(self, block: int) -> None:
        if self._keys[block] is None:
            self._empty[block] = True
            self._empty_blocks += 1
        else:
            self._cached[block] = None

    def _unname(self, block: int) -> None:
        key = self._keys[block]
        if key is None:
            raise InvariantError(f"cached block {block} has no key")
        del self._by_key[key]
        self._keys[block] = None

    def _forget(self, count: int) -> None:
        for _ in range(count):
            block, _none = self._cached.popitem(last=False)
            self._unname(block)
            self._empty[block] = True
        self._empty_blocks += count

    def _use(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._references[block] = 1
            self._empty[block] = False
        self._empty_blocks -= len(blocks)

    def _place(self, count: int) -> range:
        """Up to `count` blocks of the largest empty run.

        Behind a block in use half of the run's remainder stays free, so that
        both its sequence and the new one can grow without a break.
        """
        edges = np.flatnonzero(np.diff(self._empty, prepend=False, append=False))
        starts, stops = edges[::2], edges[1::2]
        largest = int(np.argmax(stops - starts))
        start, length = int(starts[largest]), int(stops[largest] - starts[largest])
        if length <= count:
            return range(start, start + length)
        if start and self._references[start - 1]:
            start += (length - count) // 2
        return range(start, start + count)

    def check_invariants(self) -> None:
        """Raises InvariantError unless every block is in exactly one place."""
        held = 0
        for block in range(self.blocks):
            key, references = self._keys[block], self._references[block]
            cached, empty = block in self._cached, bool(self._empty[block])
            is_held = not references and self._holds[block] > 0
            if references < 0 or (references > 0) + is_held + cached + empty != 1:
                raise InvariantError(
                    f"block {block}: references {references}, holds {self._holds[block]}, "
                    f"cached {cached}, empty {empty}"
                )
            held += is_held
            if key is None and cached:
                raise InvariantError(f"block {block} is cached without a key")
            if key is not None and (empty or self._by_key.get(key) != block):
                raise InvariantError(f"block {block} has a key that does not lead to it")
        if len(self._by_key) != sum(key is not None for key in self._keys):
            raise InvariantError("there are keys that lead to no block")
        if held != self.held_blocks:
            raise InvariantError(f"{self.held_blocks} held blocks by count, not so by holds")
        if self._empty_blocks != int(self._empty.sum()):
            raise InvariantError(f"{self._empty_blocks} empty blocks by count, not so by flag")

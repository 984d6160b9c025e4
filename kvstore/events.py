"""What becomes visible and invisible in a store's tiers, as a numbered stream.

An event is a batch, for that is how blocks come and go. Whoever has a snapshot and
applies the events after it, in order, knows what every tier holds. Events of one tier
are in the order in which they happened; between tiers there is no other order than theirs
in the stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from kvstore.errors import FallenBehindError
from kvstore.hashing import Key


class Stored(NamedTuple):
    """Blocks that can be had from a tier from now on; `parents[i]` is that of `keys[i]`."""

    tier: str
    namespace: bytes  # fingerprint
    keys: Sequence[Key]
    parents: Sequence[Key]


class Removed(NamedTuple):
    """Blocks that a tier no longer has; another one may."""

    tier: str
    namespace: bytes
    keys: Sequence[Key]


class Cleared(NamedTuple):
    """Nothing can be had any more, from any tier: the store has closed."""


Event = Stored | Removed | Cleared
Numbered = tuple[int, Event]

Contents = dict[tuple[str, bytes], dict[Key, Key]]
"""What is held: (tier, namespace) -> key -> parent."""


class Snapshot(NamedTuple):
    """What the tiers held when event number `last_id` had happened, and none after it."""

    last_id: int
    contents: Contents


def apply(contents: Contents, event: Event) -> None:
    """Make `contents` what it is after the event. No event does harm when it is applied again."""
    if isinstance(event, Stored):
        held = contents.setdefault((event.tier, event.namespace), {})
        held.update(zip(event.keys, event.parents, strict=True))
    elif isinstance(event, Removed):
        held = contents.get((event.tier, event.namespace), {})
        for key in event.keys:
            held.pop(key, None)
        if not held:
            contents.pop((event.tier, event.namespace), None)
    else:
        contents.clear()


class EventLog:
    """The last events, numbered from 1 without gaps. Not thread-safe: the owner locks."""

    def __init__(self, kept_blocks: int) -> None:
        """Keeps as many events as have no more than `kept_blocks` blocks together."""
        self._kept_blocks = kept_blocks
        self._ring: list[Event] = [Cleared()] * kept_blocks  # event n is in place n mod its length
        self._blocks = 0
        self.first_id = 1  # the oldest that is kept; above `last_id` when none is
        self.last_id = 0

    def append(self, event: Event) -> None:
        """The event gets the number after the last."""
        ring, kept = self._ring, self._kept_blocks
        self.last_id += 1
        ring[self.last_id % kept] = event
        self._blocks += blocks_of(event)
        while self._blocks > kept:
            place = self.first_id % kept
            self._blocks -= blocks_of(ring[place])
            ring[place] = Cleared()  # its keys are not held on to
            self.first_id += 1

    def since(self, after_id: int, most_blocks: int) -> list[Numbered]:
        """Events after number `after_id`: all, or the first that reach `most_blocks` blocks.

        Raises FallenBehindError where they are no longer kept, or were never told.
        """
        if not self.first_id - 1 <= after_id <= self.last_id:
            raise FallenBehindError(
                f"events {self.first_id} to {self.last_id} are kept, not what follows {after_id}: "
                "take a snapshot, and go on from there"
            )
        found: list[Numbered] = []
        for number in range(after_id + 1, self.last_id + 1):
            event = self._ring[number % self._kept_blocks]
            found.append((number, event))
            most_blocks -= blocks_of(event)
            if most_blocks <= 0:
                break
        return found


def blocks_of(event: Event) -> int:
    """What an event weighs: its blocks, and one where it has none."""
    return 1 if isinstance(event, Cleared) else len(event.keys)


def pieces(contents: Contents, most_blocks: int) -> Iterator[Stored]:
    """A snapshot's contents as events that would have led to it, of so many blocks at most.

    A block comes after its parent, where that is held in the same tier.
    """
    for (tier, namespace), held in contents.items():
        keys = [key for _, run in runs(held) for key in run]
        for start in range(0, len(keys), most_blocks):
            part = keys[start : start + most_blocks]
            yield Stored(tier, namespace, part, [held[key] for key in part])


def runs(held: Mapping[Key, Key]) -> Iterator[tuple[Key, list[Key]]]:
    """Key -> parent as runs of consecutive blocks: the parent of the first, and their keys.

    A run comes after the block that it continues, where that is among them. Each block is
    in one run.
    """
    children: defaultdict[Key, list[Key]] = defaultdict(list)
    for key, parent in held.items():
        children[parent].append(key)
    starts = [(parent, key) for key, parent in held.items() if parent not in held]
    starts.reverse()
    while starts:
        parent, key = starts.pop()
        run = [key]
        while following := children.get(key):
            starts += [(key, other) for other in following[1:]]
            key = following[0]
            run.append(key)
        yield parent, run

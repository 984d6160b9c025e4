"""Which blocks are worth a write to a drive that wears out, and how many bytes a day."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Literal, Protocol

from kvstore.hashing import Key
from kvstore.retention import DEFAULT_PRIORITY

AdmissionRule = Literal["all", "reused", "priority"]

KEYS_REMEMBERED = 262_144  # by `AdmitReused`; at 2 MiB a block, half a TiB of offers
DAY_S = 86_400.0


class Admission(Protocol):
    """Says which blocks to write. Not thread-safe: the owner locks."""

    def admits(self, key: Key, priority: int) -> bool:
        """Whether a block that is offered now should be written."""
        ...

    def used(self, keys: Iterable[Key]) -> None:
        """These blocks were used, in whatever tier."""
        ...


class AdmitAll:
    """Every block."""

    def admits(self, key: Key, priority: int) -> bool:
        return True

    def used(self, keys: Iterable[Key]) -> None:
        return


class AdmitPriority:
    """Blocks that someone asked to keep: above default priority."""

    def admits(self, key: Key, priority: int) -> bool:
        return priority > DEFAULT_PRIORITY

    def used(self, keys: Iterable[Key]) -> None:
        return


class AdmitReused:
    """Blocks that were used or offered before: three quarters of all are used once, ever."""

    def __init__(self, keys: int = KEYS_REMEMBERED) -> None:
        self._limit = keys
        self._seen: OrderedDict[Key, None] = OrderedDict()  # longest ago first

    def admits(self, key: Key, priority: int) -> bool:
        known = key in self._seen
        self.used((key,))
        return known

    def used(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > self._limit:
            self._seen.popitem(last=False)


def admission_rule(name: AdmissionRule) -> Admission:
    """The rule of that name."""
    rules: dict[AdmissionRule, type[AdmitAll | AdmitReused | AdmitPriority]] = {
        "all": AdmitAll,
        "reused": AdmitReused,
        "priority": AdmitPriority,
    }
    return rules[name]()


class WriteBudget:
    """Bytes that may be written in a day of UTC. Counts without a limit, too.

    `day` and `written_bytes` are what to keep over a restart. Not thread-safe.
    """

    def __init__(self, daily_bytes: int | None, *, day: int = 0, written_bytes: int = 0) -> None:
        self.daily_bytes = daily_bytes
        self.day = day
        self.written_bytes = written_bytes

    def take(self, nbytes: int, now_s: float) -> bool:
        """Count a write of `nbytes` at `now_s` (since the epoch), or refuse it."""
        self.turn(now_s)
        if self.daily_bytes is not None and self.written_bytes + nbytes > self.daily_bytes:
            return False
        self.written_bytes += nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        """What was counted was not written after all."""
        self.written_bytes = max(0, self.written_bytes - nbytes)

    def turn(self, now_s: float) -> None:
        """Begin a new day if it is one. A clock that was set back does not give bytes back."""
        day = int(now_s // DAY_S)
        if day > self.day:
            self.day, self.written_bytes = day, 0

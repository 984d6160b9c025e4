"""What a store in this process holds, from its tiers' tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.answers import NVME, RAM
from kvstore.below import Below
from kvstore.errors import RequestError
from kvstore.frame import CODEC_NUMBERS, RECORD_DTYPE, names
from kvstore.hashing import Key
from kvstore.hub import Hub
from kvstore.identity import Namespace
from kvstore.index import State
from kvstore.inventory import PAGE_ROWS, Page
from kvstore.tier import Checked


class StoreInventory:
    """See `Inventory`: of a store in this process."""

    def __init__(
        self, hub: Hub, below: Below | None, evict: Callable[[Sequence[Key]], int]
    ) -> None:
        self._hub = hub
        self._below = below
        self._evict = evict

    def namespaces(self) -> dict[bytes, Namespace]:
        with self._hub.lock:
            known = dict(self._hub.namespaces)
        if self._below is not None:
            known.update(self._below.namespaces())
        return known

    def tiers(self) -> list[str]:
        return [RAM] if self._below is None else [RAM, NVME]

    def page(self, tier: str, start: int = 0) -> Page:
        if tier not in self.tiers():
            raise RequestError(f"no tier {tier!r} has a table here")
        if tier == NVME and self._below is not None:
            rows, count = self._below.tier.page(start, start + PAGE_ROWS)
            rows = rows[self._seen(self._below, rows)]
        else:
            rows, count = self._ram_page(start)
        following = start + PAGE_ROWS
        return Page(rows, following if following < count else None)

    def evict(self, keys: Sequence[Key]) -> int:
        return self._evict(keys)

    def check(self, keys: Sequence[Key]) -> Checked:
        return Checked(0, 0, []) if self._below is None else self._below.tier.check(keys)

    def _seen(self, below: Below, rows: NDArray[np.void]) -> NDArray[np.bool_]:
        """Which of these blocks have not been evicted, perhaps without being gone yet."""
        with self._hub.lock:
            hidden = below.errands.hidden
            if not hidden:
                return np.ones(len(rows), dtype=bool)
            return np.array([key not in hidden for key in names(rows["key"])], dtype=bool)

    def _ram_page(self, start: int) -> tuple[NDArray[np.void], int]:
        hub, part = self._hub, slice(start, start + PAGE_ROWS)
        with hub.lock:
            hub.check_open()
            index, fingerprints = hub.slots.index, hub.slots.fingerprints()
            count = len(index.state)
            keys, parents = index.keys[part], index.parents[part]
            state, owner = index.state[part].copy(), index.namespace[part].copy()
            nbytes, priority = index.nbytes[part].copy(), index.priority[part].copy()
            expires_s = index.expires_s[part].copy()
            unused_s = hub.clock.monotonic_s() - index.used_s[part]
            now_s = hub.clock.wall_s()
        held = np.flatnonzero(state == State.RESIDENT)
        places = held.tolist()
        rows = np.zeros(len(held), RECORD_DTYPE)
        rows["codec"] = CODEC_NUMBERS["raw"]
        rows["raw_bytes"] = rows["stored_bytes"] = nbytes[held]
        rows["priority"], rows["expires_s"] = priority[held], expires_s[held]
        rows["last_use_s"] = now_s - unused_s[held]
        rows["key"] = _column([keys[place] or b"" for place in places])
        rows["parent"] = _column([parents[place] for place in places])
        rows["namespace"] = _column([fingerprints[number] for number in owner[held].tolist()])
        return rows, count


def _column(values: Sequence[bytes]) -> NDArray[np.void]:
    return np.frombuffer(b"".join(values), "V16")

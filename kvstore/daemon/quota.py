"""How much one tenant may hold, and which of its own blocks go when it wants more."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from kvstore.allocator import align_up
from kvstore.frame import names
from kvstore.hashing import Chain, Key
from kvstore.identity import Namespace
from kvstore.reservation import Reservation
from kvstore.store import BlockStore
from kvstore.tenant import Tenant

RECORDS_BYTES = 16 << 20  # of namespaces that one tenant writes into; room for tens of thousands


class NamespaceQuota:
    """The namespaces that a tenant has written into since the daemon's start.

    The store keeps the record of each in RAM and beside the blocks on NVMe, whether or not a
    block is left; without a bound one tenant could fill both.
    """

    def __init__(self) -> None:
        self._names: set[bytes] = set()
        self._nbytes = 0

    def admits(self, namespace: Namespace) -> bool:
        """Whether the tenant may write into it; if so, it counts from now on."""
        if namespace.fingerprint not in self._names:
            nbytes = len(namespace.to_json())
            if self._nbytes + nbytes > RECORDS_BYTES:
                return False
            self._names.add(namespace.fingerprint)
            self._nbytes += nbytes
        return True


class Quota:
    """A tenant's blocks in the order of use: never more than its quota, over RAM and NVMe.

    A block counts once, with the bytes of its slot, wherever it lies, from its reservation
    on. When more is wanted, the tenant's own least recently used blocks are evicted from all
    tiers; where that does not suffice (leases pin them), the reservation is shorter, and that
    is counted. A block that the store has evicted for others' sake counts until it is met
    here: never too little. Belongs to the event loop's thread.
    """

    def __init__(self, store: BlockStore, tenant: Tenant, limit_bytes: int) -> None:
        """Reads once from the store's tables what the tenant holds already."""
        self._store = store
        self._tenant = tenant
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.reserved_bytes = 0
        self.counters: Counter[str] = Counter()
        self._held: OrderedDict[Key, int] = OrderedDict()  # least recently used first
        self._reserved: dict[Reservation, int] = {}  # bytes that each counts for
        for key, nbytes in self._found():
            self._hold(key, nbytes)

    def room(self, chain: Chain) -> int:
        """For how many leading blocks of a chain there is room, made by evicting others."""
        nbytes = align_up(chain.namespace.layout.block_bytes)
        new = list(dict.fromkeys(key for key in chain.keys if key not in self._held))
        free_bytes = self._free_bytes()
        wanted_bytes = min(len(new), self.limit_bytes // nbytes) * nbytes
        if wanted_bytes > free_bytes:
            self._evict(wanted_bytes - free_bytes, chain)
            free_bytes = self._free_bytes()
        allowed = max(0, free_bytes // nbytes)
        if len(new) <= allowed:
            return len(chain)
        self.counters["quota_refused_blocks"] += len(new) - allowed
        return chain.keys.index(new[allowed])

    def reserved(self, reservation: Reservation) -> None:
        nbytes = align_up(reservation.block_bytes)
        wanted = sum(nbytes for key in reservation.keys if key not in self._held)
        self._reserved[reservation] = wanted
        self.reserved_bytes += wanted

    def committed(self, reservation: Reservation) -> None:
        """It is about to be."""
        self.aborted(reservation)
        for key in reversed(reservation.keys):  # the deepest goes before what it hangs on
            self._hold(key, align_up(reservation.block_bytes))

    def aborted(self, reservation: Reservation) -> None:
        self.reserved_bytes -= self._reserved.pop(reservation)

    def used(self, keys: Sequence[Key]) -> None:
        for key in reversed(keys):
            if key in self._held:
                self._held.move_to_end(key)

    def evicted(self, chain: Chain) -> None:
        """These may be gone."""
        self._drop_absent(chain)

    def _free_bytes(self) -> int:
        return self.limit_bytes - self.held_bytes - self.reserved_bytes

    def _evict(self, nbytes: int, keep: Chain) -> None:
        kept, going = set(keep.keys), []
        for key, size in self._held.items():
            if nbytes <= 0:
                break
            if key not in kept:
                going.append(key)
                nbytes -= size
        self.counters["quota_evicted_blocks"] += self._store.inventory.evict(going)
        self._drop_absent(Chain(keep.namespace, keep.parent, tuple(going)))

    def _drop_absent(self, chain: Chain) -> None:
        """What leases pin stays, and is tried again later than all else."""
        for key, tier in zip(chain.keys, self._store.probe(chain).tiers, strict=True):
            if tier is not None:
                self.used([key])
            elif key in self._held:
                self.held_bytes -= self._held.pop(key)

    def _hold(self, key: Key, nbytes: int) -> None:
        self.held_bytes += nbytes - self._held.pop(key, 0)
        self._held[key] = nbytes

    def _found(self) -> Iterator[tuple[Key, int]]:
        """What the tables hold of this tenant, of each tier the least recently used first."""
        inventory = self._store.inventory
        known = inventory.namespaces().items()
        own = np.array([name for name, each in known if self._tenant.owns(each)], dtype="V16")
        for tier in reversed(inventory.tiers()) if len(own) else ():
            pages = []
            start: int | None = 0
            while start is not None:
                page = inventory.page(tier, start)
                start = page.following
                pages.append(page.rows[np.isin(page.rows["namespace"], own)])
            rows = np.concatenate(pages)
            rows = rows[np.argsort(rows["last_use_s"], kind="stable")]
            sizes = map(align_up, rows["raw_bytes"].tolist())
            yield from zip(names(rows["key"]), sizes, strict=True)

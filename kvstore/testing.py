"""Checks that the author of a connector runs against their own.

    from kvstore.testing import CHECKS

    @pytest.mark.parametrize("name", CHECKS)
    def test_my_connector(name):
        CHECKS[name](MyEngine)

Give what makes an `EngineUnderTest` over a store: the class, or a function. A check brings the
stores, compares every byte, looks into the store behind the connector's back, and raises
AssertionError with a sentence when something is wrong. No test framework is needed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

import kvstore
from kvstore.errors import ClosedError
from kvstore.hashing import Chain, TokenChain
from kvstore.identity import Namespace
from kvstore.layout import DTYPE_BYTES, Shard
from kvstore.verbs import Store

KV = NDArray[np.uint8]
"""KV of some tokens as bytes: [kv_heads, layers, 2 (K, V), tokens, head_dim * bytes a number]."""


class EngineUnderTest(Protocol):
    """One engine with its connector over a store, as a process of its own would have it."""

    @property
    def namespace(self) -> Namespace:
        """Of the whole model; the same whenever the same engine is made again."""
        ...

    def put(self, tokens: Sequence[int], kv: KV) -> None:
        """As if all of `tokens` had been computed: write `kv` to pages, and save. No waiting left.

        Never raises for trouble with the store.
        """
        ...

    def get(self, tokens: Sequence[int]) -> KV:
        """Look `tokens` up, load into pages that were not used before, and read them there.

        Returns KV of as many leading tokens as were loaded. Never raises for trouble with the
        store. At least one token may be left out, for an engine must compute the last itself.
        """
        ...

    def close(self) -> None:
        """Give back threads and memory; the store stays open."""
        ...


MakeEngine = Callable[[Store], EngineUnderTest]


def tokens_of(count: int, seed: int = 0) -> list[int]:
    """Token ids that every vocabulary has, the same on every run."""
    return random.Random(seed).choices(range(3, 100), k=count)


def others_of(tokens: Sequence[int]) -> list[int]:
    """As many token ids, none of which `tokens_of` ever gives."""
    return [token + 100 for token in tokens]


def kv_of(namespace: Namespace, tokens: Sequence[int]) -> KV:
    """What belongs to the tokens: random finite numbers that differ with all tokens before."""
    heads, layers, pair, _, head_dim = namespace.layout.shape
    size = DTYPE_BYTES[namespace.kv_dtype]
    kv = np.empty((heads, layers, pair, len(tokens), head_dim * size), np.uint8)
    seen = hashlib.sha256()
    for i, token in enumerate(tokens):
        seen.update(f"{token} ".encode())
        numbers = np.random.default_rng(int.from_bytes(seen.digest()[:8], "little"))
        shape = (heads, layers, pair, head_dim * size)
        kv[:, :, :, i] = numbers.integers(0, 256, shape, np.uint8)
    # Not NaN nor infinity, which an engine may not keep bit by bit: clear an exponent bit.
    kv[..., size - 1 :: size] &= 0xBF
    return kv


def block_bytes_of(namespace: Namespace, kv: KV, shard: Shard | None = None) -> list[bytes]:
    """The canonical bytes of each full block."""
    size = namespace.block_tokens
    held = shard or namespace.layout.whole
    heads = kv[held.start : held.stop]
    return [
        heads[:, :, :, start : start + size].tobytes()
        for start in range(0, kv.shape[3] - size + 1, size)
    ]


def store_blocks(store: Store, chain: Chain, blocks: Sequence[bytes]) -> None:
    """Put canonical blocks into a store, as another engine would."""
    with store.reserve(chain) as reservation:
        for index, view in zip(reservation.indices, reservation.views, strict=True):
            view[:] = blocks[index]
        reservation.commit()


class _Bench:
    """A store, and engines over it; all are closed at the end."""

    def __init__(self, make: MakeEngine) -> None:
        self._make = make
        self.store = kvstore.open(ram_bytes="64 MiB", store_verify="always")
        self._engines: list[EngineUnderTest] = []

    def engine(self) -> EngineUnderTest:
        """A new one, which knows nothing of the others."""
        self._engines.append(self._make(self.store))
        return self._engines[-1]

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *error: object) -> None:
        for engine in self._engines:
            engine.close()
        pinned = 0
        with suppress(ClosedError):  # where the check has closed it
            pinned = self.store.stats().ram["pinned_blocks"]
        self.store.close()
        if error[0] is None:
            assert not pinned, f"{pinned} blocks are pinned by leases that nobody has released"


def _check_got(engine: EngineUnderTest, tokens: Sequence[int], at_least: int, what: str) -> None:
    """What `get` returns is right, and enough of it."""
    got, expected = engine.get(tokens), kv_of(engine.namespace, tokens)
    count = got.shape[3] if got.ndim == 5 else -1
    assert got.ndim == 5, f"{what}: get returned {got.ndim} dimensions instead of 5"
    assert count <= len(tokens), f"{what}: {count} of {len(tokens)} tokens were loaded"
    wrong = (got != expected[:, :, :, :count]).any(axis=(0, 1, 2, 4)) if count else np.zeros(0)
    first = int(np.argmax(wrong)) if wrong.any() else -1
    assert first < 0, f"{what}: the KV of token {first} is not what was stored"
    assert count >= at_least, f"{what}: {count} tokens were loaded, {at_least} are stored"


def _check_nothing(engine: EngineUnderTest, tokens: Sequence[int], what: str) -> None:
    got = engine.get(tokens)
    assert got.shape[3] == 0, f"{what}: {got.shape[3]} tokens were loaded that nobody stored"


def check_round_trip(make: MakeEngine) -> None:
    """What one engine saves another loads, byte by byte, for prompts of many lengths."""
    with _Bench(make) as bench:
        size = bench.engine().namespace.block_tokens
        for seed, count in enumerate((1, size - 1, size, size + 1, 2 * size, 5 * size + 3)):
            tokens = tokens_of(count, seed)
            _check_nothing(bench.engine(), tokens, f"{count} tokens, never seen")
            writer = bench.engine()
            writer.put(tokens, kv_of(writer.namespace, tokens))
            full = (count - 1) // size * size  # the last token may have to be computed
            _check_got(bench.engine(), tokens, full, f"{count} tokens, all saved")


def check_prefixes(make: MakeEngine) -> None:
    """Of a prompt that begins as a stored one, the blocks in common are loaded, and no more."""
    with _Bench(make) as bench:
        writer = bench.engine()
        size = writer.namespace.block_tokens
        stored = tokens_of(4 * size)
        writer.put(stored, kv_of(writer.namespace, stored))
        for common in (0, 1, size, 2 * size + 1, 4 * size):
            other = stored[:common] + others_of(tokens_of(3 * size, 1))
            what = f"{common} tokens in common"
            _check_got(bench.engine(), other, common // size * size, what)
            loaded = bench.engine().get(other).shape[3]
            assert loaded <= common, f"{what}: {loaded} tokens were loaded"
        _check_nothing(bench.engine(), stored[1:], "the same tokens, one place to the left")
        another = others_of(stored[:size]) + stored[size:]
        _check_nothing(bench.engine(), another, "another first block, and the same ones after it")


def check_growing(make: MakeEngine) -> None:
    """A conversation: each turn finds the turns before it, whichever engine had them."""
    with _Bench(make) as bench:
        size = bench.engine().namespace.block_tokens
        tokens = tokens_of(6 * size + 5)
        for count in range(size + 1, len(tokens), size + 1):
            engine = bench.engine()
            before = max(0, count - size - 1) // size * size
            _check_got(engine, tokens[:count], before, f"a turn of {count} tokens")
            engine.put(tokens[:count], kv_of(engine.namespace, tokens[:count]))


def check_writes_canonical_blocks(make: MakeEngine) -> None:
    """What is in the store is the canonical layout, under the keys of the namespace."""
    with _Bench(make) as bench:
        engine = bench.engine()
        tokens = tokens_of(3 * engine.namespace.block_tokens + 1)
        kv = kv_of(engine.namespace, tokens)
        engine.put(tokens, kv)
        chain = TokenChain(engine.namespace, tokens).chain()
        with bench.store.acquire(chain) as lease:
            lease.wait()
            count = f"{len(lease)} of {len(chain)} blocks"
            assert len(lease) == len(chain), f"{count} are under the namespace's keys"
            for i, view in enumerate(lease.views):
                expected = block_bytes_of(engine.namespace, kv)[i]
                assert bytes(view) == expected, f"block {i} is not in canonical layout"


def check_reads_canonical_blocks(make: MakeEngine) -> None:
    """Blocks that another engine has stored are found, and only those of this namespace."""
    with _Bench(make) as bench:
        engine = bench.engine()
        tokens = tokens_of(3 * engine.namespace.block_tokens + 1)
        blocks = block_bytes_of(engine.namespace, kv_of(engine.namespace, tokens))
        for field in ("weights", "rope", "adapter", "salt"):
            changed = {**dataclasses.asdict(engine.namespace), field: "another"}
            store_blocks(bench.store, TokenChain(Namespace(**changed), tokens).chain(), blocks)
        _check_nothing(engine, tokens, "blocks of other namespaces")
        store_blocks(bench.store, TokenChain(engine.namespace, tokens).chain(), blocks)
        _check_got(bench.engine(), tokens, len(tokens) - 1, "blocks of another engine")


def check_reads_shards(make: MakeEngine) -> None:
    """Blocks that the ranks of a tensor-parallel engine have stored are found, whole ones too."""
    with _Bench(make) as bench:
        namespace = bench.engine().namespace
        for ranks in range(2, namespace.kv_heads + 1):
            if namespace.kv_heads % ranks:
                continue
            tokens = tokens_of(3 * namespace.block_tokens + 1, ranks)
            chain = TokenChain(namespace, tokens).chain()
            kv = kv_of(namespace, tokens)
            for shard in namespace.layout.shards(ranks)[:-1]:
                store_blocks(
                    bench.store, chain.for_shard(shard), block_bytes_of(namespace, kv, shard)
                )
            _check_nothing(bench.engine(), tokens, f"all but one of {ranks} shards")
            shard = namespace.layout.shards(ranks)[-1]
            store_blocks(bench.store, chain.for_shard(shard), block_bytes_of(namespace, kv, shard))
            _check_got(bench.engine(), tokens, len(tokens) - 1, f"{ranks} shards")


def check_gaps(make: MakeEngine) -> None:
    """Where a block is gone, what follows it is not used."""
    with _Bench(make) as bench:
        engine = bench.engine()
        size = engine.namespace.block_tokens
        tokens = tokens_of(4 * size + 1)
        engine.put(tokens, kv_of(engine.namespace, tokens))
        bench.store.evict(TokenChain(engine.namespace, tokens).chain(2, 3))
        other = bench.engine()
        _check_got(other, tokens, 2 * size, "the third block was evicted")
        loaded = other.get(tokens).shape[3]
        assert loaded == 2 * size, f"{loaded} tokens were loaded across a gap at {2 * size}"


def check_damaged_blocks(make: MakeEngine) -> None:
    """A block whose bytes are not those that were stored ends the prefix before it."""
    with _Bench(make) as bench:
        writer = bench.engine()
        size = writer.namespace.block_tokens
        tokens = tokens_of(4 * size + 1)
        writer.put(tokens, kv_of(writer.namespace, tokens))
        with bench.store.acquire(TokenChain(writer.namespace, tokens).chain(2, 3)) as lease:
            lease.wait()
            assert len(lease) == 1, "the third block of a prompt was not saved"
            (view,) = lease.views
            address = np.frombuffer(view, np.uint8).ctypes.data
            ctypes.memset(address, 1, view.nbytes)  # views are read-only, which is the point
        engine = bench.engine()
        for _ in range(2):
            _check_got(engine, tokens, 2 * size, "the third block is damaged")
            loaded = engine.get(tokens).shape[3]
            assert loaded == 2 * size, f"{loaded} tokens were loaded, the third block is damaged"


def check_full_store(make: MakeEngine) -> None:
    """A store with room for one more block: nothing raises, and what it has is right."""
    with _Bench(make) as bench:
        engine = bench.engine()
        tokens = tokens_of(4 * engine.namespace.block_tokens + 1)
        filling = dataclasses.replace(engine.namespace, weights="filling", salt="")
        layout = filling.layout
        count = bench.store.stats().ram["capacity_bytes"] // layout.block_bytes
        chain = TokenChain(filling, tokens_of(count * layout.block_tokens)).chain()
        with bench.store.reserve(chain) as reservation:
            held = len(reservation)
            reservation.commit()
        bench.store.evict(chain.slice(held - 1))
        with bench.store.acquire(chain):  # pinned: nothing of it can be evicted
            for _ in range(2):
                engine.put(tokens, kv_of(engine.namespace, tokens))
                _check_got(bench.engine(), tokens, 0, "a store that is full")


def check_store_that_ends(make: MakeEngine) -> None:
    """A store that is closed under the connector: misses, and no error."""
    with _Bench(make) as bench:
        engine = bench.engine()
        tokens = tokens_of(3 * engine.namespace.block_tokens + 1)
        kv = kv_of(engine.namespace, tokens)
        engine.put(tokens, kv)
        bench.store.close()
        for _ in range(2):
            _check_nothing(engine, tokens, "the store is closed")
            engine.put(tokens, kv)


CHECKS: dict[str, Callable[[MakeEngine], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_round_trip,
        check_prefixes,
        check_growing,
        check_writes_canonical_blocks,
        check_reads_canonical_blocks,
        check_reads_shards,
        check_gaps,
        check_damaged_blocks,
        check_full_store,
        check_store_that_ends,
    )
}
"""Every check by name; each takes what makes an engine over a store."""

"""Keys: the names of blocks, chained so that a key stands for the whole prefix.

`key[i] = H(key[i-1] || tokens[i] as u32 little-endian)`, full blocks only; the
parent of the first is the namespace's fingerprint.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import xxhash

from kvstore.identity import HashAlgorithm, Namespace
from kvstore.layout import Shard

Key = bytes
KEY_BYTES = 16


def _sha256_16(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:KEY_BYTES]


HASHES: dict[HashAlgorithm, Callable[[bytes], bytes]] = {
    "xxh3_128": xxhash.xxh3_128_digest,
    "sha256": _sha256_16,
}


@dataclass(frozen=True, slots=True)
class Chain:
    """A run of consecutive blocks of one prompt: what every store verb takes.

    `parent` is the key before `keys[0]` (the namespace's fingerprint at the
    start of a prompt). A sequence of keys; slices are chains.
    """

    namespace: Namespace
    parent: Key
    keys: tuple[Key, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[Key]:
        return iter(self.keys)

    def slice(self, start: int, stop: int | None = None) -> Chain:
        """Blocks `[start, stop)` with the right parent."""
        start, stop, _ = slice(start, stop).indices(len(self.keys))
        parent = self.keys[start - 1] if start else self.parent
        return Chain(self.namespace, parent, self.keys[start:stop])

    def for_shard(self, shard: Shard) -> Chain:
        """The same blocks, but only the heads of `shard`: other bytes, so other keys.

        Its namespace is that of a model with no more heads than the shard has, so that
        `namespace.layout` is the layout of what is stored under the keys. Raises LayoutError
        for heads that the model does not have.
        """
        if shard == self.namespace.layout.whole:
            return self
        self.namespace.layout.shard_range(shard)
        digest = HASHES[self.namespace.hash_algorithm]
        suffix = b"shard" + shard.start.to_bytes(2, "little") + shard.heads.to_bytes(2, "little")
        keys = tuple(digest(key + suffix) for key in self.keys)
        return Chain(_with_heads(self.namespace, shard.heads), digest(self.parent + suffix), keys)


@lru_cache(maxsize=256)
def _with_heads(namespace: Namespace, kv_heads: int) -> Namespace:
    return replace(namespace, kv_heads=kv_heads)


class TokenChain:
    """The chain of one growing token sequence; hashes every token once.

    Not thread-safe: it belongs to one request.
    """

    def __init__(self, namespace: Namespace, tokens: Sequence[int] = ()) -> None:
        self.namespace = namespace
        self._keys: list[Key] = []
        self._tail = array("I")
        if self._tail.itemsize != 4:
            raise RuntimeError("kvstore needs a platform whose unsigned int has 32 bits")
        if tokens:
            self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> int:
        """Append tokens (each in [0, 2**32)); returns how many blocks became full."""
        self._tail.extend(tokens)
        block_tokens = self.namespace.block_tokens
        full = len(self._tail) // block_tokens
        if not full:
            return 0
        head, self._tail = self._tail[: full * block_tokens], self._tail[full * block_tokens :]
        if sys.byteorder == "big":
            head.byteswap()
        data = head.tobytes()
        digest = HASHES[self.namespace.hash_algorithm]
        key = self._keys[-1] if self._keys else self.namespace.fingerprint
        step = 4 * block_tokens
        append = self._keys.append
        for start in range(0, len(data), step):
            key = digest(key + data[start : start + step])
            append(key)
        return full

    def fork(self) -> TokenChain:
        """A chain of its own that begins as this one: for sequences that part here."""
        other = TokenChain(self.namespace)
        other._keys, other._tail = self._keys.copy(), self._tail[:]
        return other

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return len(self._keys) * self.namespace.block_tokens + len(self._tail)

    def __len__(self) -> int:
        return len(self._keys)

    def chain(self, start: int = 0, stop: int | None = None) -> Chain:
        """Full blocks `[start, stop)` as a frozen chain."""
        start, stop, _ = slice(start, stop).indices(len(self._keys))
        parent = self._keys[start - 1] if start else self.namespace.fingerprint
        return Chain(self.namespace, parent, tuple(self._keys[start:stop]))

"""Keys: chained, stable for ever, and the same however the tokens arrive."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from itertools import pairwise

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import LayoutError
from kvstore.hashing import KEY_BYTES, Chain, Key, TokenChain
from kvstore.identity import HashAlgorithm, Namespace
from kvstore.layout import Shard
from tests.test_identity import NAMESPACE, OTHERS

SMALL = dataclasses.replace(NAMESPACE, block_tokens=4)
ALGORITHMS: tuple[HashAlgorithm, ...] = ("xxh3_128", "sha256")

tokens_of_any_length = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def digest(data: bytes, algorithm: HashAlgorithm) -> bytes:
    if algorithm == "sha256":
        return hashlib.sha256(data).digest()[:16]
    return xxhash.xxh3_128(data).digest()


def expected_keys(namespace: Namespace, tokens: list[int]) -> list[Key]:
    """The definition, word for word: key[i] = H(key[i-1] || tokens[i] as u32 little-endian)."""
    size, parent, keys = namespace.block_tokens, namespace.fingerprint, []
    for start in range(0, len(tokens) - size + 1, size):
        block = struct.pack(f"<{size}I", *tokens[start : start + size])
        parent = digest(parent + block, namespace.hash_algorithm)
        keys.append(parent)
    return keys


@pytest.mark.parametrize(
    ("algorithm", "keys"),
    [
        (
            "xxh3_128",
            [
                "b417e622a82c4965c4a3a2d2bfb75c3c",
                "600c0d1a58035786958d9b7997b5e722",
                "77e096af576dac0ae88ea74771777ca8",
            ],
        ),
        (
            "sha256",
            [
                "49b276bc38df33f47f64e3bc30062444",
                "e69b7aa120971fbee21bdf756cb785ad",
                "dddda1ba76e5dab6a0cf186caff99786",
            ],
        ),
    ],
)
def test_keys_are_what_they_have_always_been(algorithm: HashAlgorithm, keys: list[str]) -> None:
    # When this fails, every block that users have stored has become unreachable.
    namespace = dataclasses.replace(NAMESPACE, hash_algorithm=algorithm)
    chain = TokenChain(namespace, range(48)).chain()
    assert [key.hex() for key in chain] == keys


def test_shard_keys_are_what_they_have_always_been() -> None:
    chain = TokenChain(NAMESPACE, range(16)).chain().for_shard(Shard(1, 2))
    assert [chain.parent.hex(), chain.keys[0].hex()] == [
        "8b47e62624afa86698a6a4b1736e6874",
        "9a439956d93c894f90f1b61f1457a396",
    ]


@given(tokens_of_any_length, st.sampled_from(ALGORITHMS))
def test_keys_follow_the_definition(tokens: list[int], algorithm: HashAlgorithm) -> None:
    namespace = dataclasses.replace(SMALL, hash_algorithm=algorithm)
    assert list(TokenChain(namespace, tokens).chain()) == expected_keys(namespace, tokens)


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=11)))
def test_tokens_may_come_in_pieces(pieces: list[list[int]]) -> None:
    whole = [token for piece in pieces for token in piece]
    grown = TokenChain(SMALL)
    full = sum(grown.extend(piece) for piece in pieces)
    assert grown.chain() == TokenChain(SMALL, whole).chain()
    assert full == len(grown) == len(whole) // 4
    assert grown.tokens == len(whole)


@given(tokens_of_any_length, st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
def test_a_fork_goes_its_own_way(start: list[int], one: list[int], other: list[int]) -> None:
    first = TokenChain(SMALL, start)
    second = first.fork()
    first.extend(one)
    second.extend(other)
    assert first.chain() == TokenChain(SMALL, start + one).chain()
    assert second.chain() == TokenChain(SMALL, start + other).chain()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=12, max_size=12), st.integers(0, 11))
def test_a_token_changes_its_block_and_all_after_it(tokens: list[int], place: int) -> None:
    other = tokens.copy()
    other[place] ^= 1
    ours, theirs = TokenChain(SMALL, tokens).chain(), TokenChain(SMALL, other).chain()
    same = [a == b for a, b in zip(ours, theirs, strict=True)]
    assert same == [block < place // 4 for block in range(3)]


@pytest.mark.parametrize("field", OTHERS)
def test_namespaces_that_differ_share_no_key(field: str) -> None:
    other = dataclasses.replace(NAMESPACE, **{field: OTHERS[field]})
    tokens = range(96)
    assert not {*TokenChain(NAMESPACE, tokens).chain()} & {*TokenChain(other, tokens).chain()}


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_is_no_u32_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        TokenChain(SMALL, [token])


@given(st.integers(-9, 9), st.none() | st.integers(-9, 9))
def test_slices_know_their_parent(start: int, stop: int | None) -> None:
    tokens = TokenChain(SMALL, range(24))
    whole = tokens.chain()
    part = whole.slice(start, stop)
    assert part.keys == whole.keys[start:stop]
    assert part == tokens.chain(start, stop)
    if part.keys:
        before = (whole.parent, *whole.keys)
        assert part.parent == before[before.index(part.keys[0]) - 1]


def test_a_chain_is_linked() -> None:
    chain = TokenChain(SMALL, range(40)).chain()
    assert chain.parent == SMALL.fingerprint
    for parent, key in pairwise(chain):
        assert chain.slice(chain.keys.index(key)).parent == parent


def test_shards_of_one_block_have_keys_of_their_own() -> None:
    chain = TokenChain(NAMESPACE, range(32)).chain()
    shards = [Shard(0, 1), Shard(1, 1), Shard(2, 1), Shard(0, 2), Shard(1, 2)]
    chains = [chain, *(chain.for_shard(shard) for shard in shards)]
    assert len({key for one in chains for key in one}) == len(chains) * len(chain)
    assert len({one.parent for one in chains}) == len(chains)
    assert chain.for_shard(NAMESPACE.layout.whole) is chain


def test_shard_chains_slice_as_whole_ones_do() -> None:
    chain = TokenChain(NAMESPACE, range(64)).chain()
    shard = Shard(0, 1)
    assert chain.slice(1, 3).for_shard(shard) == chain.for_shard(shard).slice(1, 3)


def test_a_chain_is_a_sequence_of_keys() -> None:
    keys = tuple(bytes([i]) * KEY_BYTES for i in range(3))
    chain = Chain(NAMESPACE, NAMESPACE.fingerprint, keys)
    assert len(chain) == 3
    assert tuple(chain) == keys
    assert hash(chain) == hash(Chain(NAMESPACE, NAMESPACE.fingerprint, keys))


def test_a_shard_is_as_long_as_its_heads() -> None:
    chain = TokenChain(NAMESPACE, range(32)).chain()
    shard = chain.for_shard(Shard(1, 2))
    assert NAMESPACE.layout.shard_range(Shard(1, 2))[1] == shard.namespace.layout.block_bytes
    assert shard.namespace.fingerprint != NAMESPACE.fingerprint
    with pytest.raises(LayoutError):
        chain.for_shard(Shard(NAMESPACE.kv_heads, 1))

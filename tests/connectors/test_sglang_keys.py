"""Keys made of SGLang's page hashes, and pages made of its token places. No SGLang is needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import kvstore
from kvstore.connectors.sglang_namespace import page_chain
from kvstore.connectors.sglang_pages import page_numbers
from kvstore.errors import LayoutError
from kvstore.identity import HashAlgorithm

NAMESPACE = kvstore.Namespace(
    model="nobody's",
    weights="random",
    tokenizer="none",
    kv_dtype="bfloat16",
    layers=3,
    kv_heads=4,
    head_dim=8,
    block_tokens=16,
    rope="none",
)
PAGES = ["5d85", "4681", "2e39", "f428"]


def test_a_batch_of_pages_goes_on_where_the_one_before_ends() -> None:
    whole = page_chain(NAMESPACE, PAGES, ())
    assert whole.parent == NAMESPACE.fingerprint
    for place in range(1, 4):
        assert page_chain(NAMESPACE, PAGES[place:], PAGES[:place]) == whole.slice(place)
        assert page_chain(NAMESPACE, PAGES[place:], ()).keys == whole.slice(place).keys


@pytest.mark.parametrize("algorithm", ["xxh3_128", "sha256"])
def test_keys_are_of_the_whole_identity(algorithm: HashAlgorithm) -> None:
    namespace = replace(NAMESPACE, hash_algorithm=algorithm)
    others = [
        replace(namespace, **{field: value})  # type: ignore[arg-type]
        for field, value in [("weights", "w"), ("salt", "s"), ("kv_heads", 2), ("block_tokens", 8)]
    ]
    chains = [page_chain(each, PAGES, ()) for each in (namespace, *others)]
    keys = {key for chain in chains for key in chain}
    assert len(keys) == len(chains) * len(PAGES)
    assert {len(key) for key in keys} == {16}


def test_places_of_whole_pages_are_pages() -> None:
    places = torch.cat([torch.arange(16) + 16 * page for page in (7, 0, 3)])
    assert page_numbers(places, 16, 3) == [7, 0, 3]
    for wrong in (places[1:], places.flip(0), places + 1, places[:16]):
        with pytest.raises(LayoutError):
            page_numbers(wrong, 16, 3)

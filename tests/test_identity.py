"""A namespace is everything that a block's KV depends on, and any change of it is seen."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import LayoutError
from kvstore.identity import Namespace, salt_digest
from kvstore.layout import LAYOUT_VERSION

NAMESPACE = Namespace(
    model="SmolLM2-135M-Instruct",
    weights="0123456789abcdef",
    tokenizer="fedcba9876543210",
    kv_dtype="bfloat16",
    layers=30,
    kv_heads=3,
    head_dim=64,
    block_tokens=16,
    rope='{"theta":100000.0,"type":"default"}',
)

# One other legal value for every field. A new field must be added here, and by that
# is shown to be part of the identity.
OTHERS: dict[str, Any] = {
    "model": "SmolLM2-360M-Instruct",
    "weights": "0123456789abcdee",
    "tokenizer": "fedcba9876543211",
    "kv_dtype": "float16",
    "layers": 31,
    "kv_heads": 4,
    "head_dim": 32,
    "block_tokens": 32,
    "rope": '{"theta":10000.0,"type":"default"}',
    "kv_quantisation": "int8",
    "adapter": "aa",
    "salt": salt_digest("tenant"),
    "layout_version": LAYOUT_VERSION + 1,
    "hash_algorithm": "sha256",
}


def test_the_fingerprint_is_what_it_has_always_been() -> None:
    # When this fails, every block that users have stored has become unreachable: say so
    # in CHANGELOG.md, or undo the change.
    assert NAMESPACE.fingerprint.hex() == "e5e5a5b9e0c97569463cb83612fedab7"


def test_every_field_has_another_value_to_try() -> None:
    assert OTHERS.keys() == {field.name for field in dataclasses.fields(Namespace)}


@pytest.mark.parametrize("field", OTHERS)
def test_every_field_changes_the_fingerprint(field: str) -> None:
    changed = dataclasses.replace(NAMESPACE, **{field: OTHERS[field]})
    assert changed.fingerprint != NAMESPACE.fingerprint
    assert NAMESPACE.differences(changed) == {field: (getattr(NAMESPACE, field), OTHERS[field])}


def test_changes_of_different_fields_are_different() -> None:
    prints = {dataclasses.replace(NAMESPACE, **{f: v}).fingerprint for f, v in OTHERS.items()}
    assert len(prints) == len(OTHERS)


@given(st.text(), st.text(), st.text(), st.text())
def test_text_cannot_move_from_one_field_to_the_next(a: str, b: str, c: str, d: str) -> None:
    one = dataclasses.replace(NAMESPACE, model=a, weights=b)
    other = dataclasses.replace(NAMESPACE, model=c, weights=d)
    assert (one.fingerprint == other.fingerprint) == ((a, b) == (c, d))


@given(st.text(), st.text(), st.integers(1, 200), st.integers(1, 64))
def test_json_gives_the_same_namespace_back(model: str, rope: str, layers: int, heads: int) -> None:
    namespace = dataclasses.replace(
        NAMESPACE, model=model, rope=rope, layers=layers, kv_heads=heads
    )
    again = Namespace.from_json(namespace.to_json())
    assert again == namespace
    assert again.fingerprint == namespace.fingerprint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '"text"',
        "null",
        json.dumps({**json.loads(NAMESPACE.to_json()), "layers": 0}),
        json.dumps({**json.loads(NAMESPACE.to_json()), "unknown": 1}),
        json.dumps({**json.loads(NAMESPACE.to_json()), "layers": "30"}),
        json.dumps({**json.loads(NAMESPACE.to_json()), "hash_algorithm": "md5"}),
    ],
)
def test_what_is_not_a_namespace_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  json's own messages are its own
        Namespace.from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        {"kv_dtype": "float64"},
        {"layers": 0},
        {"kv_heads": -1},
        {"head_dim": 0},
        {"block_tokens": 0},
        {"hash_algorithm": "md5"},
    ],
)
def test_an_impossible_namespace_does_not_exist(change: dict[str, Any]) -> None:
    with pytest.raises(LayoutError):
        dataclasses.replace(NAMESPACE, **change)


def test_a_namespace_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NAMESPACE.salt = "other"  # type: ignore[misc]


def test_a_salt_hides_its_secret() -> None:
    assert salt_digest("") == ""
    assert salt_digest("secret") == salt_digest("secret") != salt_digest("secret2")
    assert "secret" not in salt_digest("secret")

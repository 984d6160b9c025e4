"""Whose KV may be whose: the namespaces of vLLM's requests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.connectors.accounts import Accounts
from kvstore.connectors.vllm_requests import RequestNamespaces
from kvstore.identity import Namespace, salt_digest
from tests.connectors.memory import NAMESPACE
from tests.connectors.vllm_rig import request


@pytest.fixture
def namespaces() -> Iterator[RequestNamespaces]:
    namespaces = RequestNamespaces(NAMESPACE, Accounts())
    yield namespaces
    namespaces.close()


def of(namespaces: RequestNamespaces, **fields: Any) -> Namespace | None:
    return namespaces.of(request(**fields)).result()


def adapter(folder: Path, content: bytes = b"one", number: int = 1) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(content)
    return SimpleNamespace(lora_int_id=number, lora_path=str(folder))


def test_salts_and_adapters_are_namespaces(tmp_path: Path, namespaces: RequestNamespaces) -> None:
    one, two = adapter(tmp_path / "1"), adapter(tmp_path / "2", b"two", number=2)
    assert of(namespaces) == NAMESPACE
    found = [
        of(namespaces, lora_request=lora, cache_salt=salt)
        for lora in (None, one, two)
        for salt in (None, "a", "b")
    ]
    assert None not in found
    assert len(set(found)) == len(found)


def test_one_adapter_under_two_numbers_is_one(
    tmp_path: Path, namespaces: RequestNamespaces
) -> None:
    one, again = adapter(tmp_path / "1"), adapter(tmp_path / "2", number=2)
    assert of(namespaces, lora_request=one) == of(namespaces, lora_request=again) is not None


def test_the_same_salt_of_a_request_is_not_that_of_another_tenant() -> None:
    salts = ["", salt_digest("a"), salt_digest("b")]
    found = {
        of(RequestNamespaces(replace(NAMESPACE, salt=salt), Accounts()), cache_salt="x")
        for salt in salts
    }
    assert len(found) == 3


def test_an_adapter_whose_files_change_is_nobodys(
    tmp_path: Path, namespaces: RequestNamespaces, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM may have the old ones or the new ones."""
    lora = adapter(tmp_path / "1")
    assert of(namespaces, lora_request=lora) is not None
    adapter(tmp_path / "1", b"three")
    assert of(namespaces, lora_request=lora) is None
    assert of(namespaces, lora_request=lora) is None
    (line,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert "adapter 1, whose files have changed" in line.getMessage()


def test_an_adapter_whose_files_are_replaced_by_ones_that_look_alike(
    tmp_path: Path, namespaces: RequestNamespaces
) -> None:
    lora = adapter(tmp_path / "1")
    assert of(namespaces, lora_request=lora) is not None
    weights = tmp_path / "1" / "adapter_model.safetensors"
    before = weights.stat()
    other = tmp_path / "other"
    other.write_bytes(b"two")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(weights)
    assert of(namespaces, lora_request=lora) is None


def test_a_number_that_stands_for_two_adapters_is_the_first(
    tmp_path: Path, namespaces: RequestNamespaces
) -> None:
    """vLLM loads by number alone: for the second it would compute with the first."""
    one, two = adapter(tmp_path / "1"), adapter(tmp_path / "2", b"two")
    first = of(namespaces, lora_request=one)
    assert first is not None
    assert of(namespaces, lora_request=two) is None
    assert of(namespaces, lora_request=one) == first


def test_an_adapter_that_is_not_here_has_no_namespace(
    tmp_path: Path, namespaces: RequestNamespaces
) -> None:
    lora = SimpleNamespace(lora_int_id=1, lora_path=str(tmp_path))
    assert of(namespaces, lora_request=lora) is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mm_features": ["image"]}, "images"),
        ({"prompt_embeds": 1}, "embeddings"),
        ({"pooling_params": object()}, "pooling"),
    ],
)
def test_what_tokens_do_not_tell_is_said_once(
    fields: dict[str, Any],
    said: str,
    namespaces: RequestNamespaces,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert of(namespaces, **fields) is None
    assert of(namespaces, **fields) is None
    (line,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert said in line.getMessage()

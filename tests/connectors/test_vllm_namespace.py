"""What vLLM's KV is stored under, or why it is not: its configuration read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import kvstore
from kvstore.connectors.options import read_options
from kvstore.connectors.vllm_namespace import model_namespace
from kvstore.errors import ModelError, SettingsError
from kvstore.identity import Namespace, salt_digest
from tests.connectors.models import SIZES, tiny


class FullAttentionSpec:
    """As vLLM's."""

    dtype = torch.float32
    num_kv_heads = SIZES["num_key_value_heads"]
    head_size = SIZES["head_dim"]


LAYERS = [f"layer {number}" for number in range(int(SIZES["num_hidden_layers"]))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(path)
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(path / "tokenizer.json"))
    return path


def namespace_of(
    folder: Path | str,
    model: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    downloads: Path | None = None,
) -> Namespace:
    """That of a vLLM with these fields of its model's configuration, and of our settings."""
    settings = {"ram_bytes": 1, **(extra or {})}
    fields: dict[str, Any] = {
        "model": str(folder),
        "dtype": torch.float32,
        "revision": None,
        "quantization": None,
        "quantization_config": None,
        "hf_config_path": None,
        "hf_overrides": {},
        **(model or {}),
    }
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(**fields),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        load_config=SimpleNamespace(
            load_format="auto", download_dir=None if downloads is None else str(downloads)
        ),
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=settings),
    )
    group = SimpleNamespace(kv_cache_spec=FullAttentionSpec(), layer_names=LAYERS)
    cache: Any = SimpleNamespace(kv_cache_groups=[group])
    return model_namespace(config, cache, read_options(settings))


def test_it_is_that_of_our_own_engine(folder: Path) -> None:
    assert namespace_of(folder) == kvstore.model_namespace(folder, dtype="float32")


@pytest.mark.parametrize(
    "changes",
    [
        {"hf_overrides": {"rope_theta": 1.0}},
        {"quantization": "fp8"},
        {"quantization_config": {"bits": 8}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_vllm_was_told_to_do_otherwise_is_another_namespace(
    changes: dict[str, Any], folder: Path
) -> None:
    assert namespace_of(folder, changes) != namespace_of(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"hf_config_path": "elsewhere"}, "elsewhere"), ({"hf_overrides": dict}, "function")],
)
def test_what_cannot_be_known_is_refused(changes: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(ModelError, match=said):
        namespace_of(folder, changes)


def test_a_given_namespace_has_the_salt_that_is_given_with_it(folder: Path) -> None:
    given = namespace_of(folder, extra={"salt": "theirs"})
    as_text = given.to_json()
    assert namespace_of("nowhere", extra={"namespace": as_text}) == given
    ours = namespace_of("nowhere", extra={"namespace": as_text, "salt": "ours"})
    assert ours.salt == salt_digest("ours") != given.salt


def test_blocks_are_as_large_as_the_namespace_says(folder: Path) -> None:
    as_text = namespace_of(folder, extra={"block_tokens": 32}).to_json()
    same = {"namespace": as_text, "block_tokens": 32}
    assert namespace_of("nowhere", extra=same).block_tokens == 32
    with pytest.raises(SettingsError, match="block_tokens is 16"):
        namespace_of("nowhere", extra={"namespace": as_text, "block_tokens": 16})


def test_a_model_that_was_downloaded_elsewhere(folder: Path, tmp_path: Path) -> None:
    """In the layout of the hub's cache, of which vLLM was told where it is."""
    repository = tmp_path / f"models--some--{folder.name}"
    shutil.copytree(folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    found = namespace_of(f"some/{folder.name}", downloads=tmp_path)
    assert found == namespace_of(folder)
    with pytest.raises(ModelError, match="not here"):
        namespace_of("some/model", downloads=tmp_path / "empty")

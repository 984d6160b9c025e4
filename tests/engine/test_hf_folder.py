"""Hugging Face folders: what is wrong with one is said in a line, before anything is computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvstore.engine.hf_folder import HFFolder
from kvstore.errors import ModelError, RequestError


@pytest.fixture
def folder(tiny_path: Path, tmp_path: Path) -> Path:
    """The tiny model's folder, to be spoilt."""
    return Path(shutil.copytree(tiny_path, tmp_path / "tiny"))


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"hidden_size": 128}, r"embed_tokens.weight of shape \(260, 64\), not \(260, 128\)"),
        ({"vocab_size": 300}, r"embed_tokens.weight of shape \(260, 64\), not \(300, 64\)"),
        ({"num_key_value_heads": 4}, "k_proj.weight of shape"),
        ({"num_hidden_layers": 1}, "model.layers.1.* is not supported"),
        ({"num_hidden_layers": 3}, "no weight model.layers.2."),
        ({"rms_norm_eps": float("inf")}, "norm eps inf"),
        ({"rope_theta": float("nan")}, "RoPE theta nan"),
        ({"rope_scaling": "linear"}, "config.json cannot be used"),
        ({"max_position_embeddings": float("inf")}, "config.json cannot be used"),
    ],
)
def test_a_config_that_is_not_that_of_the_weights(
    folder: Path, fields: dict[str, Any], expected: str
) -> None:
    change(folder / "config.json", **fields)
    with pytest.raises(ModelError, match=expected):
        HFFolder(folder)


def test_weights_without_a_use_are_refused_unless_they_are_known_to_be_copies(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    copies = {
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    save_file({**weights, **copies}, file)
    HFFolder(folder)
    save_file({**weights, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, file)
    with pytest.raises(ModelError, match=r"q_proj.bias, which is not supported"):
        HFFolder(folder)


def test_kv_that_another_epsilon_computes_is_not_shared(tiny_path: Path, folder: Path) -> None:
    """The weights, and all that a namespace has of its own, are the same."""
    own = HFFolder(tiny_path).weights_fingerprint()
    assert own == HFFolder(folder).weights_fingerprint()
    change(folder / "config.json", rms_norm_eps=1e-6)
    assert own != HFFolder(folder).weights_fingerprint()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer.json", b"\xff{}", "tokenizer.json is not a text in UTF-8"),
        ("tokenizer.json", b"{}", "the tokenizer cannot be read"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template is not a text"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja cannot be read"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id is 'x'"),
        ("generation_config.json", b'{"eos_token_id": [1, "x"]}', "eos_token_id is"),
        ("generation_config.json", b'{"eos_token_id": {"a": 1}}', "eos_token_id is"),
    ],
)
def test_tokenizers_that_cannot_be_used(
    folder: Path, name: str, content: bytes, expected: str
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=expected):
        HFFolder(folder).tokenizer()


def test_of_several_templates_the_default_one_counts(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    templates = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    change(file, chat_template=templates)
    assert HFFolder(folder).tokenizer().render_chat([]) == "b"
    change(file, chat_template=[{"oops": 1}, 5])
    assert not HFFolder(folder).tokenizer().has_chat_template


def test_a_template_that_fails_is_a_request_that_cannot_be_served(folder: Path) -> None:
    change(folder / "tokenizer_config.json", chat_template="{{ messages + 1 }}")
    tokenizer = HFFolder(folder).tokenizer()
    with pytest.raises(RequestError, match="the chat template refused the messages: can only"):
        tokenizer.render_chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize("weight_map", [[1], {}, {"a": 1}, None])
def test_an_index_without_files(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match="has no weight_map"):
        HFFolder(folder)


def test_other_tokenizers_are_told_apart(folder: Path) -> None:
    """Engines that connectors plug into run models without a tokenizer.json."""
    seen = {HFFolder(folder).tokenizer_fingerprint()}
    (folder / "tokenizer.json").unlink()
    seen.add(HFFolder(folder).tokenizer_fingerprint())
    for content in ("one", "another"):
        (folder / "tokenizer.model").write_text(content)
        seen.add(HFFolder(folder).tokenizer_fingerprint())
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("models/SmolLM2-135M", "SmolLM2-135M"),
        ("hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/93efa2f", "SmolLM2-135M"),
        ("hub/models--gpt2/snapshots/607a30d", "gpt2"),
        ("mine/snapshots/monday", "monday"),
    ],
)
def test_a_model_is_called_the_same_in_the_hubs_cache_and_in_a_folder(
    folder: Path, tmp_path: Path, place: str, name: str
) -> None:
    (tmp_path / place).parent.mkdir(parents=True)
    shutil.move(folder, tmp_path / place)
    assert HFFolder(tmp_path / place).config.name == name
    (tmp_path / "current").symlink_to(tmp_path / place)
    assert HFFolder(tmp_path / "current").config.name == name

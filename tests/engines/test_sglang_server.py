"""The backend as a server of SGLang starts it: its arguments, its documentation, its injector."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvstore
from benchmarks.workers.lines import Worker
from kvstore.connectors import sglang_namespace
from tests.daemon.doors import Daemon
from tests.engine.tiny import tiny_model
from tests.engines.sglang_rank import Rank, all_of, chain_of, tokens_of

pytestmark = pytest.mark.engines

CONNECTORS = Path(sglang_namespace.__file__).parent
SAID = [CONNECTORS / "sglang.py", Path(__file__).parents[2] / "docs" / "connectors.md"]
TOKENS = tokens_of(70)


@pytest.fixture
def server(sglang: Worker) -> Iterator[Worker]:
    """SGLang's process, which has no arguments of a server afterwards."""
    yield sglang
    sglang.ask("serve")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with (
        kvstore.open(ram_bytes="64 MiB", store_verify="always") as store,
        Daemon(store, tmp_path / "kvstore.sock") as daemon,
    ):
        yield daemon


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model", architectures=["LlamaForCausalLM"])


def started(server: Worker, daemon: Daemon, model: Path, **arguments: Any) -> Rank:
    """A rank of a server of `model`, with nothing about it in the backend's own settings."""
    server.ask("serve", model_path=str(model), **arguments)
    namespace = kvstore.model_namespace(model)
    shape = [namespace.layers, namespace.kv_heads, namespace.head_dim]
    return Rank(server, daemon.url, extra={"namespace": None}, shape=shape, model_name="served as")


def test_the_servers_model_is_the_identity(server: Worker, daemon: Daemon, model: Path) -> None:
    namespace = kvstore.model_namespace(model)
    with started(server, daemon, model) as rank:
        assert rank.backup(TOKENS) == 64
        assert daemon.store.probe(chain_of(rank, TOKENS, namespace)).prefix == 4
    with started(server, daemon, model) as rank:
        assert rank.prefetch(TOKENS) == all_of(TOKENS)
    other = tiny_model(model.with_name("other"), seed=1, architectures=["LlamaForCausalLM"])
    with started(server, daemon, other) as rank:
        assert rank.prefetch(TOKENS) == [0, 0, 0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"json_model_override_args": '{"rope_theta": 20000}'},
        {"quantization": "fp8"},
        {"kv_cache_dtype": "bf16"},
        {"model_impl": "transformers"},
    ],
)
def test_arguments_on_which_kv_depends_are_in_the_identity(
    server: Worker, daemon: Daemon, model: Path, arguments: dict[str, str]
) -> None:
    with started(server, daemon, model) as rank:
        assert rank.backup(TOKENS) == 64
    with started(server, daemon, model, **arguments) as rank:
        assert rank.prefetch(TOKENS) == [0, 0, 0]
        assert rank.backup(TOKENS) == 64
        assert rank.prefetch(TOKENS) == all_of(TOKENS)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"enable_lora": True, "lora_paths": {"a": "/nowhere"}}, "LoRA"),
        ({"load_format": "dummy"}, "'dummy' cannot be told apart"),
    ],
)
def test_servers_whose_kv_has_no_name_run_without(
    server: Worker, daemon: Daemon, model: Path, arguments: dict[str, Any], reason: str
) -> None:
    with started(server, daemon, model, **arguments) as rank:
        (line,) = server.ask("said")
        assert reason in line
        assert rank.backup(TOKENS) == 0


@pytest.mark.parametrize("file", SAID, ids=lambda file: file.name)
def test_the_flags_that_are_documented_work(
    server: Worker, daemon: Daemon, model: Path, file: Path
) -> None:
    (told,) = re.findall(r"backend-extra-config '(\{[^']*\})'", file.read_text())
    extra = json.loads(told)
    assert extra["interface_v1"] == 1
    server.ask("serve", model_path=str(model))
    namespace = kvstore.model_namespace(model)
    shape = [namespace.layers, namespace.kv_heads, namespace.head_dim]
    extra |= {"namespace": None, "url": daemon.url}
    with Rank(server, daemon.url, extra=extra, shape=shape, layout="page_first") as rank:
        assert rank.backup(TOKENS) == 64
        assert rank.prefetch(TOKENS) == all_of(TOKENS)


def test_sglangs_own_injector_of_failures_finds_no_garbage(sglang: Worker, daemon: Daemon) -> None:
    with Rank(sglang, daemon.url, failing=0.5, page_size=4) as rank:
        for seed in range(30):
            tokens = tokens_of(40, seed)
            saved = rank.backup(tokens)
            found, came, right = rank.prefetch(tokens)
            assert saved in (0, 40)
            assert found >= came == right

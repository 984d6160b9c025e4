"""The parts of the vLLM connector that need no vLLM. tests/engines has the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import kvstore
from kvstore.connectors.accounts import Accounts
from kvstore.connectors.connector import Connector
from kvstore.connectors.options import SharedStore, read_options
from kvstore.connectors.vllm_lookups import LATE_S, Lookups
from kvstore.connectors.vllm_namespace import RequestNamespaces
from kvstore.connectors.vllm_pages import cpu_pages, proven
from kvstore.connectors.vllm_prefill import PrefillClock
from kvstore.errors import LayoutError, SettingsError
from kvstore.hashing import TokenChain
from kvstore.identity import Namespace
from kvstore.layout import Shard
from kvstore.planner import prefill_seconds
from tests.daemon.doors import Daemon
from tests.store.rig import put

NAMESPACE = Namespace("tiny", "w", "t", "bfloat16", 3, 2, 8, 16, "")
WHOLE = NAMESPACE.layout.whole
PAGE = 32
TOKENS = list(range(400))

Write = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def transposing(cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """K [head_dim, tokens] in the first half of each page and head, V by token in the second."""
    heads, dim = cache.shape[1], cache.shape[3] // 2
    for token, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, PAGE)
        halves = cache[page].view(heads, 2, PAGE * dim)
        halves[:, 0].view(heads, dim, PAGE)[:, :, offset] = keys[token]
        halves[:, 1].view(heads, PAGE, dim)[:, offset] = values[token]


def by_token(cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    heads, dim = cache.shape[1], cache.shape[3] // 2
    for token, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, PAGE)
        both = cache[page].view(heads, 2, PAGE, dim)
        both[:, 0, offset], both[:, 1, offset] = keys[token], values[token]


def side_by_side(cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """K and V of a token next to each other: what the tensor's shape suggests."""
    for token, slot in enumerate(slots.tolist()):
        page, offset = divmod(slot, PAGE)
        cache[page, :, offset] = torch.cat([keys[token], values[token]], dim=-1)


def tried(write: Write, heads: Shard = WHOLE) -> tuple[Any, list[Tensor]]:
    caches = [torch.zeros(5, heads.heads, PAGE, 16, dtype=torch.bfloat16) for _ in range(3)]
    names = ["a", "b", "c"]

    def written(name: str, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        write(caches[names.index(name)], keys, values, slots)

    candidates = [cpu_pages(caches, NAMESPACE, heads, flag) for flag in (True, False)]
    return proven(candidates, names, written), caches


@pytest.mark.parametrize("heads", [WHOLE, Shard(1, 1)])
@pytest.mark.parametrize(("write", "transposed"), [(transposing, True), (by_token, False)])
def test_the_layout_that_is_written_is_the_one_that_is_read(
    write: Write, transposed: bool, heads: Shard
) -> None:
    pages, caches = tried(write, heads)
    assert pages.layout.keys_transposed == transposed
    assert not any(cache.any() for cache in caches)


def test_a_layout_that_nobody_knows_is_refused() -> None:
    with pytest.raises(LayoutError, match="not known"):
        tried(side_by_side)


@pytest.fixture
def lookups() -> Iterator[Lookups]:
    lookups = Lookups(Accounts())
    yield lookups
    lookups.close()
    lookups.join()


def ask(lookups: Lookups, connector: Connector, tokens: Sequence[int]) -> tuple[int, int]:
    """The answer, and how often it was asked for."""
    chain = TokenChain(connector.namespace, tokens).chain()
    question = lookups.ask(connector, chain, 0)
    for asked in range(1, 100_000):
        answer = lookups.answer(question, 0.01)
        if answer is not None:
            return answer, asked
    raise AssertionError("no answer came")


def test_what_is_on_nvme_is_in_ram_when_the_answer_comes(tmp_path: Path, lookups: Lookups) -> None:
    chain = TokenChain(NAMESPACE, TOKENS).chain()
    nvme = {"nvme_path": tmp_path / "nvme", "nvme_bytes": "16 MiB"}
    with kvstore.open(ram_bytes="1 MiB", **nvme) as store:
        put(store, chain)
        assert store.flush(30)
    with kvstore.open(ram_bytes="1 MiB", **nvme) as store, Connector(store, NAMESPACE) as connector:
        assert store.probe(chain).tiers == ["nvme"] * 25
        answer, asked = ask(lookups, connector, TOKENS)
        assert answer == 400
        assert asked > 1
        assert store.probe(chain).tiers == ["ram"] * 25


def test_a_store_that_does_not_answer_is_not_asked_again(tmp_path: Path) -> None:
    accounts = Accounts()
    lookups = Lookups(accounts)
    with (
        kvstore.open(ram_bytes="1 MiB") as store,
        Daemon(store, tmp_path / "s") as daemon,
        kvstore.connect(daemon.url, timeout_s=LATE_S * 4) as client,
        Connector(client, NAMESPACE, accounts=accounts) as connector,
    ):
        put(store, TokenChain(NAMESPACE, TOKENS).chain())
        with daemon.wedged():
            assert ask(lookups, connector, TOKENS)[0] == 0
            assert accounts.stats().counters["late_lookups"] == 1
            assert ask(lookups, connector, TOKENS) == (0, 1)
        lookups.close()
        lookups.join()


def request(**fields: Any) -> Any:
    common: dict[str, Any] = {"mm_features": [], "prompt_embeds": None, "pooling_params": None}
    return SimpleNamespace(**{**common, "cache_salt": None, "lora_request": None, **fields})


def test_salts_and_adapters_are_namespaces(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"one")
    lora = SimpleNamespace(lora_int_id=1, lora_path=str(tmp_path), load_inplace=False)
    namespaces = RequestNamespaces(NAMESPACE, "")
    assert namespaces.of(request()) == NAMESPACE
    salted = namespaces.of(request(cache_salt="a"))
    adapted = namespaces.of(request(lora_request=lora))
    both = namespaces.of(request(lora_request=lora, cache_salt="a"))
    weights.write_bytes(b"two")
    lora.load_inplace = True
    changed = namespaces.of(request(lora_request=lora))
    found = [NAMESPACE, salted, adapted, both, changed]
    assert len(set(found)) == len(found)
    assert None not in found


@pytest.mark.parametrize("fields", [{"mm_features": ["image"]}, {"prompt_embeds": 1}])
def test_what_tokens_do_not_tell_has_no_namespace(fields: dict[str, Any]) -> None:
    assert RequestNamespaces(NAMESPACE, "").of(request(**fields)) is None


def test_an_adapter_that_is_not_here_has_no_namespace(tmp_path: Path) -> None:
    lora = SimpleNamespace(lora_int_id=1, lora_path=str(tmp_path), load_inplace=False)
    assert RequestNamespaces(NAMESPACE, "").of(request(lora_request=lora)) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "names no store"),
        ({"url": "unix:///x", "ram_bytes": 1}, "ram_bytes"),
        ({"ram_bytes": 1, "token": "x"}, "no url"),
        ({"url": 3}, "must be a text"),
        ({"ram_bytes": 1, "block_tokens": "16"}, "block_tokens"),
        ({"ram_bytes": 1, "deadline_s": -1}, "deadline_s"),
        ({"ram_bytes": 1, "namespace": "{}"}, "namespace"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        read_options(given)


def test_two_who_say_the_same_have_one_store() -> None:
    options = read_options({"ram_bytes": "1 MiB"})
    one, two = SharedStore(options), SharedStore(options)
    assert one.store is two.store
    one.close()
    one.close()
    assert two.store.stats().ram["blocks"] == 0
    two.close()
    again = SharedStore(options)
    assert again.store is not two.store
    again.close()


def test_only_steps_of_one_prompt_alone_are_timed() -> None:
    clock = PrefillClock()
    for requests, tokens in [(2, 512), (1, 1)]:
        clock.step_begins(requests, tokens, 0)
        clock.step_has_ended()
    clock.step_begins(1, 512, 0)
    clock.step_begins(1, 512, 512)  # before the first has ended
    clock.step_has_ended()
    clock.step_has_ended()
    assert clock.cost.observations == 0
    clock.step_begins(1, 512, 0)
    clock.step_has_ended()
    assert clock.cost.observations == 1
    seconds = prefill_seconds(clock.cost, 0, 512)
    assert seconds is not None
    assert seconds > 0

"""The parts of the vLLM connector that need no vLLM. tests/engines has the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvstore.connectors.accounts import Accounts
from kvstore.connectors.convert import Pages
from kvstore.connectors.options import SharedStore, read_options
from kvstore.connectors.vllm_guard import Guard
from kvstore.connectors.vllm_pages import cpu_pages, gpu_pages, proven
from kvstore.connectors.vllm_prefill import PrefillClock
from kvstore.connectors.vllm_report import Report
from kvstore.errors import LayoutError, SettingsError
from kvstore.identity import Namespace
from kvstore.layout import Shard
from kvstore.planner import prefill_seconds
from kvstore.tier import Miss

NAMESPACE = Namespace("tiny", "w", "t", "bfloat16", 3, 2, 8, 16, "")
WHOLE = NAMESPACE.layout.whole
PAGE = 32

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


def on_gpus(
    write: Write, order: list[int], block_tokens: int = 16, device: str = "cpu"
) -> tuple[Pages, list[Tensor]]:
    """Tensors that look like [blocks, heads, tokens, 2 * head_dim], and lie in `order`."""
    shape = (5, 2, PAGE, 16)
    sizes = [shape[axis] for axis in order]
    back = [order.index(axis) for axis in range(4)]
    zeros = partial(torch.zeros, sizes, dtype=torch.bfloat16, device=device)
    caches = [zeros().permute(back) for _ in range(3)]
    names = ["a", "b", "c"]

    def written(name: str, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        write(caches[names.index(name)], keys, values, slots)

    namespace = replace(NAMESPACE, block_tokens=block_tokens)
    candidates = [gpu_pages(caches, namespace, WHOLE)]
    return proven(candidates, names, written, torch.device(device)), caches


def tried(write: Write, heads: Shard = WHOLE) -> tuple[Any, list[Tensor]]:
    caches = [torch.zeros(5, heads.heads, PAGE, 16, dtype=torch.bfloat16) for _ in range(3)]
    names = ["a", "b", "c"]

    def written(name: str, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        write(caches[names.index(name)], keys, values, slots)

    candidates = [cpu_pages(caches, NAMESPACE, heads, flag) for flag in (True, False)]
    return proven(candidates, names, written, torch.device("cpu")), caches


@pytest.mark.parametrize("heads", [WHOLE, Shard(1, 1)])
@pytest.mark.parametrize(("write", "transposed"), [(transposing, True), (by_token, False)])
def test_the_layout_that_is_written_is_the_one_that_is_read(
    write: Write, transposed: bool, heads: Shard
) -> None:
    pages, caches = tried(write, heads)
    assert pages.layout.keys_transposed == transposed
    assert not any(cache.any() for cache in caches)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 1, 3], [1, 0, 2, 3]])
def test_on_gpus_tensors_say_how_they_lie(order: list[int], device: str) -> None:
    pages, caches = on_gpus(side_by_side, order, device=device)
    assert pages.layout.order == "BHNKD"
    assert not any(cache.any() for cache in caches)
    caches[1][3, 1, 5, 8:] = 1  # V of a token
    block = np.zeros((2, 3, 2, 16, 8), np.uint16)
    pages.copy_out([3], 0, [block.data.cast("B")], 16)
    assert block[1, 1, 1, 5].all()
    assert np.count_nonzero(block) == 8


def test_on_gpus_as_well_what_is_read_back_is_believed() -> None:
    with pytest.raises(LayoutError, match="not known"):
        on_gpus(by_token, [0, 1, 2, 3])
    with pytest.raises(LayoutError, match="block_tokens may be 256"):
        on_gpus(side_by_side, [0, 1, 2, 3], block_tokens=512)


def test_a_layout_that_nobody_knows_is_refused() -> None:
    with pytest.raises(LayoutError, match="not known"):
        tried(side_by_side)


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
        clock.step_has_ended(clock.step_begins(requests, tokens, 0))
    first = clock.step_begins(1, 512, 0)
    second = clock.step_begins(1, 512, 512)  # before the first has ended
    clock.step_has_ended(first)
    clock.step_has_ended(second)
    assert clock.cost.observations == 0
    clock.step_has_ended(clock.step_begins(1, 512, 0))
    assert clock.cost.observations == 1
    seconds = prefill_seconds(clock.cost, 0, 512)
    assert seconds is not None
    assert seconds > 0


def test_a_step_whose_end_is_not_heard_of_does_not_stop_the_clock() -> None:
    clock = PrefillClock()
    clock.step_begins(1, 512, 0)
    clock.step_has_ended(clock.step_begins(1, 512, 0))
    assert clock.cost.observations == 0  # the first may have run beside it
    clock.step_has_ended(clock.step_begins(1, 512, 0))
    assert clock.cost.observations == 1


def test_after_something_unexpected_nothing_is_called(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard()
    called: list[int] = []

    def verb(number: int) -> int:
        called.append(number)
        return 100 // number

    assert [guard(-1, verb, number) for number in (4, 0, 5)] == [25, -1, -1]
    assert called == [4, 0]
    (line,) = caplog.records
    assert "running without it" in line.message
    assert line.exc_info is not None


def test_a_report_has_what_is_new() -> None:
    accounts = Accounts()
    report = Report(accounts)
    accounts.count("lookups", 2)
    assert report.take() is None
    report.has_news = True
    assert report.take() == {"counted": {"lookups": 2}}
    accounts.count("lookups")
    accounts.missed(3, Miss.ABSENT)
    report.has_news = True
    assert report.take() == {"counted": {"lookups": 1}, "missed_blocks": {"absent": 3}}
    report.has_news = True
    assert report.take() is None

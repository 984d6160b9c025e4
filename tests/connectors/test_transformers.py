"""transformers with a store: the same answers, computed from what was stored."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

import kvstore
from kvstore.connectors import transformers as connector
from kvstore.connectors.accounts import Usage
from kvstore.connectors.transformers import PrefixCache, cached_generate
from kvstore.connectors.transformers_model import namespace_of
from kvstore.errors import ModelError, RequestError
from kvstore.store import BlockStore
from kvstore.verbs import Store
from tests.connectors.models import KINDS, tiny, tiny_mla

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def prompt(tokens: int, seed: int = 0) -> Tensor:
    return torch.tensor([random.Random(seed).choices(range(3, 300), k=tokens)])


def answer(model: Any, input_ids: Tensor, **arguments: Any) -> list[list[int]]:
    """Greedy, by the model alone."""
    tokens: list[list[int]] = model.generate(
        input_ids, **{"max_new_tokens": 24, "do_sample": False, **arguments}
    ).tolist()
    return tokens


def cached(cache: PrefixCache, input_ids: Tensor, **arguments: Any) -> list[list[int]]:
    tokens: list[list[int]] = cache.generate(
        input_ids, **{"max_new_tokens": 24, "do_sample": False, **arguments}
    ).tolist()
    return tokens


def last_usage(cache: PrefixCache, before: Usage | None = None) -> Usage:
    """Of what has been generated since `before`."""
    stats = cache.stats()
    assert stats is not None
    if before is None:
        return stats.usage
    ours, theirs = dataclasses.astuple(stats.usage), dataclasses.astuple(before)
    return Usage(*(a - b for a, b in zip(ours, theirs, strict=True)))


@pytest.fixture
def ram_store() -> Iterator[BlockStore]:
    with kvstore.open(ram_bytes="16 MiB") as store:
        yield store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_prefix_changes_no_answer(
    kind: str, dtype: torch.dtype, ram_store: BlockStore
) -> None:
    model = tiny(kind, dtype)
    for seed in range(3):
        cache = PrefixCache(model, ram_store)
        cold = answer(model, prompt(150, seed))
        assert cached(cache, prompt(150, seed)) == cold
        first = last_usage(cache)
        assert first == Usage(recomputed_tokens=150)
        assert cached(cache, prompt(150, seed)) == cold
        assert last_usage(cache, first) == Usage(ram_tokens=144, recomputed_tokens=6)


def test_conversations_go_on_where_they_were(store: Store) -> None:
    """Three of them in turns; each turn finds all of the turns before, answers included."""
    model = tiny()
    cache = PrefixCache(model, store)
    said = [prompt(40, seed) for seed in range(3)]
    for turn in range(3):
        for i, history in enumerate(said):
            before = last_usage(cache) if cache.stats() else Usage()
            expected = answer(model, history)
            assert cached(cache, history) == expected
            used = last_usage(cache, before)
            assert used.prompt_tokens == history.shape[1]
            if turn:
                # All but the question, the answer's last token, and what fills no block.
                assert used.ram_tokens >= history.shape[1] - 10 - 1 - 16
            said[i] = torch.cat([torch.tensor(expected), prompt(10, 100 * turn + i)], dim=1)


def test_two_lines_in_another_process_are_enough(store: Store) -> None:
    cold = answer(tiny(), prompt(100))
    for _ in range(2):
        output = cached_generate(tiny(), prompt(100), store, max_new_tokens=24, do_sample=False)
        assert output.tolist() == cold
    assert store.stats().hits == {"ram": 6}


def test_whatever_generate_returns(ram_store: BlockStore) -> None:
    model = tiny()
    cache = PrefixCache(model, ram_store)
    config = GenerationConfig(
        max_new_tokens=5, output_scores=True, return_dict_in_generate=True, pad_token_id=0
    )
    cold = model.generate(prompt(60), generation_config=config)
    for _ in range(2):
        warm = cache.generate(prompt(60), generation_config=config)
        assert torch.equal(warm.sequences, cold.sequences)
        for ours, theirs in zip(warm.scores, cold.scores, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert warm.past_key_values.get_seq_length() == 64
    assert last_usage(cache).ram_tokens == 48


def test_sampling_with_a_seed(ram_store: BlockStore) -> None:
    model = tiny()
    arguments = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.2}
    torch.manual_seed(1)
    cold = answer(model, prompt(100), **arguments)
    cache = PrefixCache(model, ram_store)
    for _ in range(2):
        torch.manual_seed(1)
        assert cached(cache, prompt(100), **arguments) == cold
    assert last_usage(cache).ram_tokens == 96


@pytest.mark.parametrize("lengths", [(100, 100), (100, 60, 83), (100, 5), (33, 100, 1)])
def test_batches_padded_on_the_left(ram_store: BlockStore, lengths: tuple[int, ...]) -> None:
    model = tiny()
    width = max(lengths)
    input_ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for i, length in enumerate(lengths):
        input_ids[i, width - length :] = prompt(length, seed=i)[0]
        mask[i, width - length :] = 1
    cache = PrefixCache(model, ram_store)
    cold = answer(model, input_ids, attention_mask=mask)
    assert cached(cache, input_ids, attention_mask=mask) == cold
    before = last_usage(cache)
    assert before == Usage(recomputed_tokens=sum(lengths))
    assert cached(cache, input_ids, attention_mask=mask) == cold
    used = last_usage(cache, before)
    assert used.prompt_tokens == sum(lengths)
    assert used.ram_tokens > 0 or min(lengths) == 1
    # One by one they find what they have stored together.
    for i, length in enumerate(lengths):
        before = last_usage(cache)
        alone = answer(model, prompt(length, seed=i))
        assert cached(cache, prompt(length, seed=i)) == alone
        assert last_usage(cache, before).ram_tokens == (length - 1) // 16 * 16


CHANGES: dict[str, Callable[[], Any]] = {
    "weights": lambda: tiny(seed=1),
    "kind": lambda: tiny("qwen2"),
    "theta": lambda: tiny(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "rope": lambda: tiny(rope_parameters=LLAMA3),
    "norm": lambda: tiny(rms_norm_eps=1e-3),
    "dtype": lambda: tiny(dtype=torch.bfloat16),
    "heads": lambda: tiny(num_key_value_heads=4),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_never_hits(change: str, ram_store: BlockStore) -> None:
    cached(PrefixCache(tiny(), ram_store), prompt(100))
    other = CHANGES[change]()
    cache = PrefixCache(other, ram_store)
    assert cached(cache, prompt(100)) == answer(other, prompt(100))
    assert last_usage(cache) == Usage(recomputed_tokens=100)


def test_weights_that_change_never_hit(ram_store: BlockStore) -> None:
    """One number of one layer, while the cache is in use; and back again."""
    model = tiny()
    cache = PrefixCache(model, ram_store)
    cached(cache, prompt(100))
    weight = model.model.layers[0].mlp.up_proj.weight.data
    kept = weight[3, 5].item()
    weight[3, 5] += 1
    assert cached(cache, prompt(100)) == answer(model, prompt(100))
    assert last_usage(cache) == Usage(recomputed_tokens=100)
    weight[3, 5] = kept
    assert cached(cache, prompt(100)) == answer(model, prompt(100))
    assert last_usage(cache) == Usage(ram_tokens=96, recomputed_tokens=4)


@pytest.mark.parametrize("block_tokens", [None, 16, 32])
def test_salts_are_apart(ram_store: BlockStore, block_tokens: int | None) -> None:
    """Also where a namespace is given, whose block size then is the one."""
    model = tiny()
    given = None if block_tokens is None else namespace_of(model, block_tokens=block_tokens)
    for salt in ("", "a", "b"):
        cache = PrefixCache(model, ram_store, salt=salt, namespace=given)
        cached(cache, prompt(100))
        assert last_usage(cache) == Usage(recomputed_tokens=100)


class Adapter(torch.nn.Module):
    """A layer of a maker that transformers does not know, as adapters put them in."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Any:
        return self.base(x) * 1.5


def adapted() -> Any:
    model = tiny()
    model.model.layers[1].mlp.down_proj = Adapter(model.model.layers[1].mlp.down_proj)
    return model


def hooked() -> Any:
    """As steering vectors are put in."""
    model = tiny()
    model.model.layers[0].register_forward_hook(lambda module, given, output: output * 3.0)
    return model


def hooked_before() -> Any:
    model = tiny()
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda module, given: (given[0] * 3.0,)
    )
    return model


def patched() -> Any:
    model = tiny()
    norm = model.model.norm
    model.model.norm.forward = lambda hidden: type(norm).forward(norm, hidden) * 3.0
    return model


def another_attention() -> Any:
    model = tiny()
    model.config._attn_implementation = "mine"
    return model


REFUSED_MODELS: dict[str, Callable[[], Any]] = {
    "sliding window": lambda: tiny("mistral", sliding_window=64),
    "hybrid": lambda: tiny(
        "qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=1
    ),
    "MLA": tiny_mla,
    "adapter": adapted,
    "training": lambda: tiny().train(),
    "dynamic rope": lambda: tiny(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ),
    "mixed dtypes": lambda: mixed(),
    "hook": hooked,
    "hook before": hooked_before,
    "patched forward": patched,
    "another attention": another_attention,
}


def mixed() -> Any:
    model = tiny()
    model.lm_head.to(torch.bfloat16)
    return model


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_models_that_are_not_known_are_refused(name: str) -> None:
    with pytest.raises(ModelError):
        namespace_of(REFUSED_MODELS[name](), block_tokens=16)


def test_under_autocast_kv_is_of_another_dtype() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ModelError):
        namespace_of(tiny(), block_tokens=16)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_what_only_looks_and_what_is_compiled_is_the_same_model() -> None:
    model = tiny()
    plain = namespace_of(model, block_tokens=16)
    model(prompt(10), output_hidden_states=True, output_attentions=True)  # leaves hooks behind
    assert any(module._forward_hooks for module in model.modules())
    model.forward = torch.compile(model.forward)
    assert namespace_of(model, block_tokens=16) == plain


@pytest.mark.parametrize("name", ["sliding window", "hybrid", "MLA", "adapter", "hook"])
def test_refused_models_generate_by_themselves(
    name: str, ram_store: BlockStore, caplog: pytest.LogCaptureFixture
) -> None:
    connector._say.cache_clear()
    model = REFUSED_MODELS[name]()
    cache = PrefixCache(model, ram_store)
    with caplog.at_level(logging.WARNING, logger="kvstore"):
        for _ in range(3):
            assert cached(cache, prompt(100)) == answer(model, prompt(100))
    assert len(caplog.records) == 1
    assert "without the store" in caplog.text
    assert ram_store.stats().ram["blocks"] == 0


REFUSED_ARGUMENTS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 2},
    "several answers": {"num_return_sequences": 2, "do_sample": True},
    "static cache": {"cache_implementation": "static"},
    "named cache": {"cache_implementation": "dynamic"},
    "no cache": {"use_cache": False},
    "lookup decoding": {"prompt_lookup_num_tokens": 2},
    "config": {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=4)},
    "hidden states": {"output_hidden_states": True},
    "positions": {"position_ids": torch.arange(50)[None]},
}


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_arguments_that_are_not_known_are_refused(
    name: str, ram_store: BlockStore, caplog: pytest.LogCaptureFixture
) -> None:
    connector._say.cache_clear()
    model = tiny()
    arguments = {"max_new_tokens": 4, **REFUSED_ARGUMENTS[name]}
    if name == "config":
        del arguments["max_new_tokens"]
    for _ in range(2):
        torch.manual_seed(0)
        expected = model.generate(prompt(50), **arguments)
        torch.manual_seed(0)
        assert torch.equal(cached_generate(model, prompt(50), ram_store, **arguments), expected)
    ours = [record for record in caplog.records if record.name.startswith("kvstore")]
    assert len(ours) == 1
    assert ram_store.stats().ram["blocks"] == 0


@pytest.mark.parametrize("store", ["unix:///run/kvstore.sock", None])
def test_what_is_no_store_is_refused(store: Any) -> None:
    with pytest.raises(RequestError, match=r"kvstore\.connect"):
        cached_generate(tiny(), prompt(10), store, max_new_tokens=1)


def test_masks_with_holes_are_refused(ram_store: BlockStore) -> None:
    model = tiny()
    cache = PrefixCache(model, ram_store)
    for hidden in (slice(90, 100), slice(40, 50)):
        mask = torch.ones(1, 100, dtype=torch.long)
        mask[0, hidden] = 0
        expected = answer(model, prompt(100), attention_mask=mask)
        assert cached(cache, prompt(100), attention_mask=mask) == expected
    padded = prompt(100)
    padded[0, :10] = 0  # the padding token, and no mask that says so
    assert cached(cache, padded) == answer(model, padded)
    assert cache.stats() is None


def test_a_store_that_is_gone_changes_nothing(ram_store: BlockStore) -> None:
    model = tiny()
    cache = PrefixCache(model, ram_store)
    cold = cached(cache, prompt(100))
    ram_store.close()
    assert cached(cache, prompt(100)) == cold
    assert last_usage(cache) == Usage(recomputed_tokens=200)


def test_wrong_bytes_would_be_seen(ram_store: BlockStore) -> None:
    """The negative control: zeros in the store change the answer, so hits are what is tested."""
    model = tiny()
    cache = PrefixCache(model, ram_store)
    cold = cached(cache, prompt(100))
    ram_store._hub.ram.buffer[:] = bytes(len(ram_store._hub.ram.buffer))
    assert cached(cache, prompt(100)) != cold

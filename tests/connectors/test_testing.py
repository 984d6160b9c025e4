"""The kit that checks connectors: ours pass it, and each of these broken ones does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from kvstore.connectors.connector import Connector
from kvstore.connectors.convert import Pages
from kvstore.connectors.page_layout import PageLayout
from kvstore.connectors.transformers import PrefixCache, Row
from kvstore.connectors.transformers_model import namespace_of
from kvstore.hashing import TokenChain
from kvstore.identity import Namespace
from kvstore.testing import CHECKS, KV, EngineUnderTest, MakeEngine
from kvstore.verbs import Lease, Store
from tests.connectors.models import tiny

NAMESPACE = Namespace("tiny", "weights", "tokenizer", "bfloat16", 2, 4, 8, 16, "rope")
LAYOUT = PageLayout("KBNHD", 20, 64, 2, 4, 8, "bfloat16")


class Right:
    """An engine with pages and a connector as it should be."""

    namespace = NAMESPACE
    stored_as = NAMESPACE

    def __init__(self, store: Store) -> None:
        self.store = store
        self.tensors = [torch.zeros(LAYOUT.shape, dtype=torch.bfloat16) for _ in range(2)]
        self.pages = Pages(LAYOUT, self.tensors)
        self.connector = Connector(store, self.stored_as)

    def put(self, tokens: Sequence[int], kv: KV) -> None:
        self.write(kv)
        self.connector.save(tokens, range(20), self.pages)

    def get(self, tokens: Sequence[int]) -> KV:
        load = self.connector.load(tokens, range(20), self.pages)
        load.wait()
        return self.read(load.loaded_tokens.stop)

    def close(self) -> None:
        self.connector.close()

    def write(self, kv: KV) -> None:
        bits = torch.from_numpy(kv.view(np.int16))
        for layer, tensor in enumerate(self.tensors):
            flat = tensor.view(torch.int16).view(2, -1, 4, 8)
            flat[:, : bits.shape[3]] = bits[:, layer].permute(1, 2, 0, 3)

    def read(self, tokens: int) -> KV:
        """Of the first tokens in the pages."""
        flat = [tensor.view(torch.int16).view(2, -1, 4, 8)[:, :tokens] for tensor in self.tensors]
        bits: Any = torch.stack(flat).permute(3, 0, 1, 2, 4).contiguous().numpy()
        return np.asarray(bits.view(np.uint8))


class SwapsHalves(Right):
    """Consistent with itself, and with nobody else."""

    def write(self, kv: KV) -> None:
        super().write(np.ascontiguousarray(kv[:, :, ::-1]))

    def read(self, tokens: int) -> KV:
        return np.ascontiguousarray(super().read(tokens)[:, :, ::-1])


class LosesSigns(Right):
    def read(self, tokens: int) -> KV:
        return np.bitwise_and(super().read(tokens), np.uint8(0x7F))


class StoresElsewhere(Right):
    stored_as = dataclasses.replace(NAMESPACE, weights="not what it says")


class NeverSaves(Right):
    def put(self, tokens: Sequence[int], kv: KV) -> None:
        pass


class SavesOnce(Right):
    """Not what has been added to a prompt that it has seen."""

    def put(self, tokens: Sequence[int], kv: KV) -> None:
        if not self.connector.lookup(tokens).tokens:
            super().put(tokens, kv)


class SaysAll(Right):
    def get(self, tokens: Sequence[int]) -> KV:
        self.connector.load(tokens, range(20), self.pages).wait()
        return self.read(len(tokens))


class WantsAnyOrder(Right):
    """Takes what is there after a gap too."""

    def get(self, tokens: Sequence[int]) -> KV:
        chain = TokenChain(self.namespace, tokens).chain()
        held = [tier is not None for tier in self.store.probe(chain).tiers]
        for i, is_held in enumerate(held):
            if is_held:
                with self.store.acquire(chain.slice(i, i + 1)) as lease:
                    lease.wait()
                    tokens_of_it = range(i * 16, i * 16 + 16)
                    self.pages.copy_in(
                        range(20), i * 16, lease.views, 16, LAYOUT.held, tokens_of_it
                    )
        return self.read(16 * (len(held) - held[::-1].index(True)) if any(held) else 0)


class ForgetsTheParent(Right):
    """Names a block by its own tokens: every block is the first of a prompt."""

    def put(self, tokens: Sequence[int], kv: KV) -> None:
        for start in range(0, len(tokens) - 15, 16):
            self.write(np.ascontiguousarray(kv[:, :, :, start : start + 16]))
            self.connector.save(tokens[start : start + 16], range(20), self.pages)

    def get(self, tokens: Sequence[int]) -> KV:
        loaded = []
        for start in range(0, len(tokens) - 15, 16):
            load = self.connector.load(tokens[start : start + 16], range(20), self.pages)
            load.wait()
            loaded.append(self.read(load.loaded_tokens.stop))
        return np.concatenate([*loaded, self.read(0)], axis=3)


class KnowsNoShards(Right):
    def get(self, tokens: Sequence[int]) -> KV:
        chain = TokenChain(self.namespace, tokens).chain()
        with self.store.acquire(chain) as lease:
            ready = lease.wait()
            self.pages.copy_in(range(20), 0, lease.views, 16, LAYOUT.held, range(ready * 16))
        return self.read(ready * 16)


class InsistsOnRoom(Right):
    """Writes to slots that it did not get."""

    def put(self, tokens: Sequence[int], kv: KV) -> None:
        self.write(kv)
        chain = TokenChain(self.namespace, tokens).chain()
        missing = self.store.probe(chain).tiers.count(None)
        with self.store.reserve(chain) as reservation:
            views = [reservation.views[i] for i in range(missing)]
            self.pages.copy_out(range(20), 16 * (len(chain) - missing), views, 16)
            reservation.commit()


class BelievesTheProbe(Right):
    """Says that all is loaded of which the store has said that it is there."""

    def get(self, tokens: Sequence[int]) -> KV:
        found = self.connector.lookup(tokens).tokens
        self.connector.load(tokens, range(20), self.pages).wait()
        return self.read(found)


class LeaksLeases(Right):
    kept: list[Lease]

    def get(self, tokens: Sequence[int]) -> KV:
        chain = TokenChain(self.namespace, tokens).chain()
        self.__dict__.setdefault("kept", []).append(self.store.acquire(chain))
        return super().get(tokens)


BROKEN: dict[type[Right], str] = {
    SwapsHalves: "writes_canonical_blocks",
    LosesSigns: "round_trip",
    StoresElsewhere: "reads_canonical_blocks",
    NeverSaves: "growing",
    SavesOnce: "growing",
    SaysAll: "round_trip",
    WantsAnyOrder: "gaps",
    ForgetsTheParent: "prefixes",
    KnowsNoShards: "reads_shards",
    BelievesTheProbe: "damaged_blocks",
    InsistsOnRoom: "full_store",
}


class Transformers:
    """`PrefixCache` as the kit sees it: its cache filled and stored without the model's help."""

    def __init__(self, store: Store) -> None:
        self.model = tiny(dtype=torch.bfloat16)
        self.namespace = namespace_of(self.model, block_tokens=16)
        self.cache = PrefixCache(self.model, store)

    def put(self, tokens: Sequence[int], kv: KV) -> None:
        bits = torch.from_numpy(kv.view(np.int16)).view(torch.bfloat16)
        filled = DynamicCache(config=self.model.config)
        for layer in range(self.namespace.layers):
            filled.update(bits[None, :, layer, 0], bits[None, :, layer, 1], layer)
        row = Row(0, list(tokens))
        self.cache._save(self.cache._current(), [row], filled, torch.tensor([row.tokens]))

    def get(self, tokens: Sequence[int]) -> KV:
        filled = self.cache._filled(self.cache._current(), [Row(0, list(tokens))])
        if not filled.get_seq_length():
            shape = self.namespace.layout.shape
            return np.zeros((*shape[:3], 0, 2 * shape[4]), np.uint8)
        layers = [torch.stack([layer.keys[0], layer.values[0]], 1) for layer in filled.layers]
        bits: Any = torch.stack(layers, 1).view(torch.int16).contiguous().numpy()
        return np.asarray(bits.view(np.uint8))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("make", [Right, Transformers])
@pytest.mark.parametrize("name", CHECKS)
def test_ours_pass(name: str, make: MakeEngine) -> None:
    CHECKS[name](make)


@pytest.mark.parametrize("name", CHECKS)
def test_blocks_of_one_token_pass_too(name: str) -> None:
    class Small(Right):
        namespace = stored_as = dataclasses.replace(NAMESPACE, block_tokens=1)

    CHECKS[name](Small)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_one_is_seen(broken: type[Right]) -> None:
    with pytest.raises((AssertionError, IndexError)):
        CHECKS[BROKEN[broken]](broken)


def test_leaked_leases_are_seen() -> None:
    with pytest.raises(AssertionError, match="pinned"):
        CHECKS["round_trip"](LeaksLeases)


def test_a_store_that_ends_is_checked() -> None:
    class Raises(Right):
        def get(self, tokens: Sequence[int]) -> KV:
            self.store.probe(TokenChain(self.namespace, tokens).chain())
            return super().get(tokens)

    with pytest.raises(Exception, match="closed"):
        CHECKS["store_that_ends"](Raises)


def test_every_check_has_a_broken_connector() -> None:
    assert {*BROKEN.values(), "store_that_ends"} == CHECKS.keys()


def test_the_protocol_is_what_ours_have() -> None:
    makers: list[type[EngineUnderTest]] = [Right, Transformers]
    assert len(makers) == 2

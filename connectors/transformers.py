"""Hugging Face transformers: `generate` that finds its prompts' beginnings in a store.

    from kvstore.connectors.transformers import cached_generate
    output = cached_generate(model, input_ids, store, max_new_tokens=100)

stands where `model.generate(input_ids, max_new_tokens=100)` stood.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.cache_utils import DynamicCache

from kvstore.connectors.accounts import ConnectorStats
from kvstore.connectors.connector import DEADLINE_S, Connector, check_store
from kvstore.connectors.convert import Pages
from kvstore.connectors.page_layout import PageLayout
from kvstore.connectors.transformers_model import check_arguments, namespace_of
from kvstore.errors import InputError, LayoutError, RequestError
from kvstore.identity import Namespace, salt_digest
from kvstore.verbs import Store

log = logging.getLogger(__name__)


def cached_generate(model: Any, input_ids: Tensor, store: Store, **arguments: Any) -> Any:
    """`model.generate(input_ids, **arguments)`, and no token of a stored prefix computed again.

    Returns what `generate` returns. To keep figures, or to give a salt, make a `PrefixCache`.
    """
    return PrefixCache(model, store).generate(input_ids, **arguments)


class Row(NamedTuple):
    """One sequence of a batch: what is left of it without the padding on its left."""

    padding: int
    tokens: list[int]


class PrefixCache:
    """A model and a store: `generate` loads what is stored of a prompt, and stores all it computes.

    What it does not know (other models and caches, beams, adapters, ...) it leaves to the model
    alone, and says so once in the log. Belongs to one thread, as the model does.
    """

    def __init__(
        self,
        model: Any,
        store: Store,
        *,
        block_tokens: int = 16,
        salt: str = "",
        namespace: Namespace | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """`salt` separates what is stored from all who have another one.

        `namespace`, of another engine with the very same weights and dtype, makes each find what
        the other has stored; that they are the same is then the caller's word. It must not be
        given for a model that is changed afterwards. `block_tokens` is then the namespace's, and
        so is its salt, where none is given here. Raises RequestError for what is no store.
        """
        check_store(store)
        if namespace is not None:
            block_tokens = namespace.block_tokens
            if salt:
                namespace = replace(namespace, salt=salt_digest(salt))
        self._model = model
        self._store = store
        self._block_tokens = block_tokens
        self._salt = salt
        self._namespace = namespace
        self._deadline_s = deadline_s
        self._connector: Connector | None = None

    def generate(self, input_ids: Any, **arguments: Any) -> Any:
        """As `model.generate`; `input_ids` is int64 [batch, tokens], padded on the left."""
        try:
            check_arguments(self._model, arguments)
            rows = self._rows(input_ids, arguments)
            connector = self._current()
        except InputError as refusal:
            _say(f"generating without the store: {refusal}")
            return self._model.generate(input_ids, **arguments)
        cache = self._filled(connector, rows)
        clock = _Clock()
        processors = [*(arguments.pop("logits_processor", None) or []), clock]
        loaded = cache.get_seq_length()
        output = self._model.generate(
            input_ids,
            past_key_values=cache,
            logits_processor=LogitsProcessorList(processors),
            **arguments,
        )
        if len(rows) == 1:
            computed = input_ids.shape[1] - loaded
            mean_position = (input_ids.shape[1] + loaded) / 2
            connector.prefill.observe(computed, computed * mean_position, clock.first_s)
        sequences = output if isinstance(output, Tensor) else output.sequences
        self._save(connector, rows, cache, sequences)
        return output

    def stats(self) -> ConnectorStats | None:
        """What was loaded and stored for the model as it is; None before the first prompt."""
        return None if self._connector is None else self._connector.stats()

    # ---- inside

    def _current(self) -> Connector:
        """Of the model as it is now: weights that have changed have another namespace."""
        own = namespace_of(self._model, block_tokens=self._block_tokens, salt=self._salt)
        namespace = self._namespace or own
        if own.layout != namespace.layout:
            raise RequestError(f"the model's KV is {own.layout}, not {namespace.layout}")
        if self._connector is None or self._connector.namespace != namespace:
            self._connector = Connector(self._store, namespace, deadline_s=self._deadline_s)
        return self._connector

    def _rows(self, input_ids: Any, arguments: dict[str, Any]) -> list[Row]:
        """The sequences of the batch. Raises RequestError for masks with holes."""
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not input_ids.numel():
            raise RequestError("input_ids are no tensor [batch, tokens]")
        mask = arguments.get("attention_mask")
        if mask is None:
            config = arguments.get("generation_config")
            pad = arguments.get("pad_token_id", getattr(config, "pad_token_id", None))
            pad = self._model.generation_config.pad_token_id if pad is None else pad
            if pad is not None and bool(torch.isin(input_ids, torch.as_tensor(pad)).any()):
                raise RequestError("input_ids have padding, but there is no attention_mask")
            mask = torch.ones_like(input_ids)
        if mask.shape != input_ids.shape:
            raise RequestError(f"attention_mask is {tuple(mask.shape)}, not as input_ids")
        present = mask.ne(0)
        padding = (~present).sum(1).tolist()
        rows = [
            Row(pad, tokens[pad:]) for pad, tokens in zip(padding, input_ids.tolist(), strict=True)
        ]
        if not all(bool(row[pad:].all()) for pad, row in zip(padding, present, strict=True)):
            raise RequestError("attention_mask hides tokens that are no padding on the left")
        return rows

    def _filled(self, connector: Connector, rows: Sequence[Row]) -> Any:
        """A cache with the columns that every row has in the store or as padding."""
        cache = DynamicCache(config=self._model.config)
        # The last token must be computed, for its logits.
        hits = [connector.lookup(row.tokens[:-1]).tokens for row in rows]
        columns = min(row.padding + hit for row, hit in zip(rows, hits, strict=True))
        layout = connector.namespace.layout
        heads, layers, pair, _, head_dim = layout.shape
        # Zeros where there is padding: what is masked out must still be a number.
        shape = (len(rows), heads, layers, pair, max(1, columns), head_dim)
        kv = torch.zeros(shape, dtype=self._model.dtype)
        ends = []
        for row, own in zip(rows, kv, strict=True):
            wanted = max(0, columns - row.padding)
            room = max(1, wanted)
            page = PageLayout("HLKBND", 1, room, layers, heads, head_dim, layout.dtype)
            pages = Pages(page, [own[..., own.shape[-2] - room :, :]])
            load = connector.load(row.tokens, [0], pages, stop_token=wanted)
            load.wait()
            ends.append(row.padding + load.loaded_tokens.stop)
        columns = min(columns, *ends)
        if columns:
            kv = kv[..., :columns, :].to(self._model.device)
            for layer in range(layers):
                cache.update(kv[:, :, layer, 0], kv[:, :, layer, 1], layer)
        return cache

    def _save(
        self, connector: Connector, rows: Sequence[Row], cache: Any, sequences: Tensor
    ) -> None:
        """Store what the cache holds; the tokens are those of the answers."""
        layout = connector.namespace.layout
        try:
            columns = cache.get_seq_length()
            for i, row in enumerate(rows):
                tensors = [
                    half[i, :, row.padding :].cpu()
                    for layer in cache.layers
                    for half in (layer.keys, layer.values)
                ]
                tokens = sequences[i, row.padding : columns].tolist()
                page = PageLayout(
                    "HBND", 1, columns - row.padding, layout.layers, layout.kv_heads,
                    layout.head_dim, layout.dtype,
                )  # fmt: skip
                connector.save(tokens, [0], Pages(page, tensors))
        except LayoutError as error:
            _say(f"not storing what was computed: {error}")


class _Clock:
    """A logits processor that changes nothing and knows when the prompt had been computed."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self.first_s = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.first_s = self.first_s or time.monotonic() - self._start_s
        return scores


@lru_cache(maxsize=256)
def _say(message: str) -> None:
    """A warning, once for each message."""
    log.warning("%s", message)

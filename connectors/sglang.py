"""SGLang: a storage backend of its HiCache, which keeps host pages in a store.

    python -m sglang.launch_server --model-path MODEL --page-size 64 \\
        --enable-hierarchical-cache --hicache-storage-backend dynamic \\
        --hicache-storage-backend-extra-config '{
            "backend_name": "kvstore",
            "module_path": "kvstore.connectors.sglang",
            "class_name": "KVStoreHiCache",
            "interface_v1": 1,
            "hicache_storage_pass_prefix_keys": true,
            "url": "unix:///run/kvstore.sock"}'

Written against SGLang 0.5.23. docs/connectors.md has the settings and what is not supported.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult

from kvstore.connectors.accounts import ConnectorStats
from kvstore.connectors.connector import Connector
from kvstore.connectors.convert import Pages
from kvstore.connectors.options import SharedStore, read_options
from kvstore.connectors.sglang_namespace import page_chain, pool_namespace
from kvstore.connectors.sglang_pages import check_pool, host_pages, page_numbers
from kvstore.errors import KVStoreError, SettingsError
from kvstore.hashing import Chain

if TYPE_CHECKING:
    from sglang.srt.mem_cache.hicache_storage import (
        HiCacheStorageConfig,
        HiCacheStorageExtraInfo,
        PoolTransfer,
    )
    from torch import Tensor

log = logging.getLogger("sglang.kvstore")

WHERE = "hicache-storage-backend-extra-config"
# Of SGLang itself.
_SGLANGS = (
    "backend_name",
    "module_path",
    "class_name",
    "interface_v1",
    "tp_lcm_size",
    "prefetch_threshold",
    "prefetch_timeout_base",
    "prefetch_timeout_per_ki_token",
    "hicache_storage_pass_prefix_keys",
)

T = TypeVar("T")


class _Attached(NamedTuple):
    """What is there once the pool is known, and nothing speaks against it."""

    connector: Connector
    pages: Pages
    shared: SharedStore

    def chain(self, keys: Sequence[str], extra_info: HiCacheStorageExtraInfo | None) -> Chain:
        before = extra_info.prefix_keys if extra_info is not None else None
        return page_chain(self.connector.namespace, keys, before or ())


class KVStoreHiCache(HiCacheStorage):  # type: ignore[misc]
    """One for each rank. SGLang's own threads ask it, and wait for its answers.

    A model, or a host pool, that is not known is said so once in the log: nothing is stored and
    nothing is hit then. So it is while the store is away. No verb raises for either.
    """

    def __init__(
        self, storage_config: HiCacheStorageConfig, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """As SGLang's factory calls it. Raises SettingsError for settings that cannot be."""
        given = dict(storage_config.extra_config or {})
        self._is_v1 = bool(given.get("interface_v1"))
        rest = {name: value for name, value in given.items() if name not in _SGLANGS}
        self._model = rest.pop("model", "")
        if not isinstance(self._model, str):
            raise SettingsError(f"{WHERE}: model must be a text")
        if "block_tokens" in rest:
            raise SettingsError(f"{WHERE}: block_tokens is SGLang's --page-size")
        self._options = read_options(rest, WHERE)
        if not self._options.url and storage_config.tp_size > 1:
            raise SettingsError(
                f"{WHERE}: ranks are separate processes and need one store: start "
                f"`kvstore daemon` and give its url"
            )
        self._config = storage_config
        self._attached: _Attached | None = None

    # ---- SGLang's pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Know the pool, and open the store, or say why not. Blocks for a second."""
        super().register_mem_pool_host(mem_pool_host)
        self.close()
        if not self._is_v1:
            log.warning('kvstore: running without it: %s lacks "interface_v1": 1', WHERE)
            return
        config, options = self._config, self._options
        try:
            check_pool(mem_pool_host)
            namespace = pool_namespace(config, mem_pool_host, options, self._model)
            heads = namespace.layout.shards(config.tp_size)[config.tp_rank]
            pages = host_pages(mem_pool_host, namespace, heads)
            shared = SharedStore(options)
        except SettingsError:
            raise
        except Exception as refusal:
            why = refusal if isinstance(refusal, KVStoreError) else repr(refusal)
            log.warning("kvstore: running without it: %s", why)
            return
        connector = Connector(shared.store, namespace, heads=heads, deadline_s=options.deadline_s)
        self._attached = _Attached(connector, pages, shared)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Pages without what the other pools of a hybrid model hold would be half of its KV."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool is not self.mem_pool_host and self._attached is not None:
            log.warning(
                "kvstore: running without it: its host pool %s is not known", host_pool_name
            )
            self.close()

    # ---- pages

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        """How many leading pages a `batch_get_v1` would bring."""

        def exists(to: _Attached) -> int:
            return (
                to.connector.lookup(to.chain(keys, extra_info)).tokens // to.connector.block_tokens
            )

        return self._unless_refused(exists, 0)

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Fill pages; True for those that came, the leading ones. Waits for them."""

        def get(to: _Attached) -> list[bool]:
            size = to.connector.block_tokens
            table = page_numbers(host_indices, size, len(keys))
            load = to.connector.load(to.chain(keys, extra_info), table, to.pages)
            load.wait()
            return [i < len(load.loaded_tokens) // size for i in range(len(keys))]

        return self._unless_refused(get, [False] * len(keys))

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Copy pages into the store; True for those that it has now. SGLang keeps its pages."""

        def put(to: _Attached) -> list[bool]:
            size = to.connector.block_tokens
            table = page_numbers(host_indices, size, len(keys))
            chain = to.chain(keys, extra_info)
            held = len(keys)
            if to.connector.save(chain, table, to.pages).refused:
                held = to.connector.lookup(chain).tokens // size
            return [i < held for i in range(len(keys))]

        return self._unless_refused(put, [False] * len(keys))

    # ---- what SGLang asks of backends without interface_v1, which this one is not

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> None:
        return None

    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[None]:
        return [None] * len(keys)

    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        return False

    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        return False

    # ---- what it asks for hybrid models, of which none is known

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> Any:
        return PoolTransferResult.empty()

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return {transfer.name: [False] * len(transfer.keys or ()) for transfer in transfers}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        return {transfer.name: [False] * len(transfer.keys or ()) for transfer in transfers}

    # ---- the rest

    def clear(self) -> NoReturn:
        """Raises NotImplementedError, which SGLang reports: the store is others' as well."""
        raise NotImplementedError("blocks of a store go by `kvstore evict`, not through SGLang")

    def stats(self) -> ConnectorStats | None:
        """Counters since the pool was registered; None without a store."""
        return None if self._attached is None else self._attached.connector.stats()

    def close(self) -> None:
        """Give the store back. May be called twice."""
        attached, self._attached = self._attached, None
        if attached is not None:
            attached.connector.close()
            attached.shared.close()

    def _unless_refused(self, verb: Callable[[_Attached], T], refusal: T) -> T:
        """What the verb returns; `refusal` without a store, and for pages that cannot be."""
        attached = self._attached
        if attached is None:
            return refusal
        try:
            return verb(attached)
        except Exception as error:
            attached.connector.warn_once("pages", "kvstore: a miss: %r", error)
            return refusal

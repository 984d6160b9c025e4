"""vLLM: its KV connector, which loads prompts' beginnings from a store and saves what it computes.

    vllm serve MODEL --kv-transfer-config '{
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore.connectors.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"url": "unix:///run/kvstore.sock"}}'

Written against vLLM 0.32, and 0.33's source. docs/connectors.md has the settings, and what is
not supported.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from kvstore.connectors.options import SharedStore, read_options
from kvstore.connectors.vllm_events import Events
from kvstore.connectors.vllm_guard import Guard
from kvstore.connectors.vllm_jobs import Done, Orders, Ready, Refused
from kvstore.connectors.vllm_namespace import model_namespace
from kvstore.connectors.vllm_pages import vllm_pages
from kvstore.connectors.vllm_scheduler import Scheduler
from kvstore.connectors.vllm_stats import KVStorePromMetrics, KVStoreStats
from kvstore.connectors.vllm_worker import Worker
from kvstore.errors import LayoutError, ModelError, SettingsError
from kvstore.store import BlockStore

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger("vllm.kvstore")

KVConnectorMetadata.register(Orders)
KVConnectorWorkerMetadata.register(Done)
for introduction in (Ready, Refused):
    KVConnectorHandshakeMetadata.register(introduction)


class KVStoreConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """One for vLLM's scheduler and one for each of its workers; they share nothing but messages.

    A model, or a layout of KV, that is not known is said so once in the log: vLLM then runs as
    without a connector. Loads and saves run beside the model, never in its way.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        """Raises SettingsError for settings that cannot be, and as the store's opening does."""
        super().__init__(vllm_config, role, kv_cache_config)
        _log_beside_vllm()
        transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
        options = read_options(transfer.kv_connector_extra_config)
        if not options.url and parallel.distributed_executor_backend != "uni":
            raise SettingsError(
                "vLLM's scheduler and workers are separate processes and need one store: start "
                "`kvstore daemon` and give its url in kv_connector_extra_config "
                "(or, with one worker, run with --distributed-executor-backend uni, and on a CPU "
                "with VLLM_ENABLE_V1_MULTIPROCESSING=0)"
            )
        self._guard = Guard()
        self._shared: SharedStore | None = None
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        self._events: Events | None = None
        self._introduction: Ready | Refused = Refused("nobody has shown it its KV")
        try:
            self._namespace = model_namespace(vllm_config, kv_cache_config, options)
        except ModelError as refusal:
            self._introduction = Refused(str(refusal))
            if role == KVConnectorRole.SCHEDULER:  # which else hears it from its workers
                _say_refused(str(refusal))
            return
        self._shared = SharedStore(options)
        if role == KVConnectorRole.WORKER:
            self._worker = Worker(self._shared.store, options.deadline_s, parallel.rank == 0)
            return
        events, store = vllm_config.kv_events_config, self._shared.store
        if events is not None and events.enable_kv_cache_events and isinstance(store, BlockStore):
            self._events = Events(store.feed, self._namespace)
        if transfer.kv_load_failure_policy != "recompute":
            log.warning(
                'kvstore: kv_load_failure_policy is "fail": a block that is lost between lookup '
                'and load ends its request with an error; "recompute" computes it'
            )

    # ---- worker

    def register_kv_caches(self, kv_caches: Mapping[str, Tensor]) -> None:
        if self._worker is None:
            return
        parallel = self._vllm_config.parallel_config
        page_tokens = self._kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        try:
            shards = self._namespace.layout.shards(parallel.tensor_parallel_size)
            heads = shards[parallel.rank % parallel.tensor_parallel_size]
            pages = vllm_pages(self._vllm_config, kv_caches, self._namespace, heads)
            if pages.layout.block_tokens != page_tokens:
                raise LayoutError(f"its tensors' blocks are not of {page_tokens} tokens")
        except Exception as refusal:
            self._introduction = Refused(str(refusal))
            return
        self._worker.pages = pages
        self._introduction = Ready(self._namespace.fingerprint)

    def get_handshake_metadata(self) -> Ready | Refused:
        return self._introduction

    def handle_preemptions(self, kv_connector_metadata: Orders) -> None:
        if self._worker is not None:
            self._worker.take_back(kv_connector_metadata.preempted)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.start_loads(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: requests whose KV is being loaded are not computed meanwhile."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        """Nothing: blocks are saved with all their layers, when the step has been computed."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            orders = self._get_connector_metadata()
            self._worker.start_saves(orders)
            self._worker.rest(orders)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        if self._worker is None:
            return None, None
        return self._worker.finished(self._get_connector_metadata())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set() if self._worker is None else self._worker.failed_pages()

    def build_connector_worker_meta(self) -> Done | None:
        return None if self._worker is None else self._worker.done()

    # ---- scheduler

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[Any, Any]) -> None:
        """Begin to work when every worker has said that it knows its pages.

        Asked again when vLLM wakes up, by when what was stored before may have been forgotten.
        """
        if self._shared is None or self._scheduler is not None:
            return
        workers = self._vllm_config.parallel_config.world_size
        said = list(metadata.values())
        ready = [each for each in said if isinstance(each, Ready)]
        reasons = {each.reason for each in said if isinstance(each, Refused)}
        if any(each.fingerprint != self._namespace.fingerprint for each in ready):
            reasons.add("the workers see another model's files")
        if len(said) < workers:
            reasons.add(f"{workers - len(said)} of {workers} workers have said nothing")
        if reasons:
            _say_refused("; ".join(sorted(reasons)))
            return
        spec = self._kv_cache_config.kv_cache_groups[0].kv_cache_spec
        self._scheduler = Scheduler(
            self._shared.store,
            self._namespace,
            spec.block_size,
            workers,
            self._kv_transfer_config.kv_role,
        )
        log.info("kvstore: in use, namespace %s", self._namespace.fingerprint.hex())

    def on_new_request(self, request: Request) -> None:
        if self._scheduler is not None:
            self._guard(None, self._scheduler.arrived, request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        none: int | None = 0
        tokens = self._guard(none, self._scheduler.matched, request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        if self._scheduler is not None and num_external_tokens:
            (pages,) = blocks.get_block_ids()
            self._scheduler.allocated(request, pages, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Orders:
        if self._scheduler is None:
            return Orders()
        state = scheduler_output.kv_connector_block_state

        def pages_of(request_id: str) -> list[int]:
            pages: list[int] = state.resolve_block_ids(request_id)[0]
            return pages

        orders = self._scheduler.orders(scheduler_output)
        self._guard(None, self._scheduler.computing, orders, scheduler_output, pages_of)
        return orders

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        if self._scheduler is not None:
            done = connector_output.kv_connector_worker_meta
            if isinstance(done, Done):
                self._guard(None, self._scheduler.heard, done)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is None:
            return False, None
        return self._scheduler.finished(request.request_id), None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    def take_events(self) -> Iterable[Any]:
        return () if self._events is None else self._guard([], self._events.take)

    def reset_cache(self) -> bool:
        """As after a change of weights: what was stored before is not found any more."""
        if self._scheduler is not None:
            pool = self._kv_cache_manager.block_pool
            # As vLLM sees it, who has just tried to forget what is in its own; one is never used.
            in_use = pool.num_gpu_blocks - pool.get_num_free_blocks() > 1
            self._guard(None, self._scheduler.forget, in_use)
        return True

    # ---- both

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is lost is a later miss, and no more."""
        return False

    def get_kv_connector_stats(self) -> KVStoreStats | None:
        side = self._worker or self._scheduler
        counts = None if side is None else side.counts()
        return KVStoreStats(counts) if counts else None

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """Asked by 0.33. Nobody has tried whether pages come back as they were."""
        return False

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVStoreStats:
        return KVStoreStats(data or {})

    @classmethod
    def build_prom_metrics(cls, *arguments: Any) -> KVStorePromMetrics:
        return KVStorePromMetrics(*arguments)

    def shutdown(self) -> None:
        """Ends what was begun, and closes the store. May be called twice."""
        for side in (self._worker, self._scheduler, self._events):
            if side is not None:
                side.close()
        if self._shared is not None:
            self._shared.close()


def _say_refused(why: str) -> None:
    log.warning("kvstore: running without it: %s", why)


def _log_beside_vllm() -> None:
    """What the store and its client say goes where vLLM's own lines go, in its form."""
    ours, theirs = logging.getLogger("kvstore"), logging.getLogger("vllm")
    if not ours.handlers:
        for handler in theirs.handlers:
            ours.addHandler(handler)
        ours.setLevel(theirs.level)
        ours.propagate = theirs.propagate

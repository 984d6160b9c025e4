"""What the connector has done, for vLLM's log and its Prometheus endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import prometheus_client
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvstore.connectors.vllm_report import COUNTED, LOADED, MISSED

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_METRICS = {
    LOADED: ("Tokens whose KV came from kvstore, by the tier that it came from.", "tier"),
    MISSED: ("Blocks that were to be loaded from kvstore and did not come, by reason.", "reason"),
}
_COUNTERS = {
    "loads": "Loads from kvstore that have ended.",
    "loaded_blocks": "Blocks loaded from kvstore.",
    "saved_blocks": "Blocks stored in kvstore.",
    "refused_blocks": "Blocks that kvstore had no room for, or was away.",
    "dropped_blocks": "Blocks saved later, or not at all, because too many saves were waiting.",
    "store_errors": "Errors of kvstore, each of which was a miss.",
    "lookups": "Prompts looked up in kvstore.",
    "late_lookups": "Lookups given up because kvstore did not answer.",
}


class KVStoreStats(KVConnectorStats):  # type: ignore[misc]
    """Counts since the last report: `data` is kind -> name -> number."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVStoreStats:
        for kind, counts in other.data.items():
            mine = self.data.setdefault(kind, {})
            for name, number in counts.items():
                mine[name] = mine.get(name, 0) + number
        return self

    def reduce(self) -> dict[str, int | float]:
        return {
            f"{name} {kind}" if kind != COUNTED else name: number
            for kind, counts in self.data.items()
            for name, number in counts.items()
        }

    def is_empty(self) -> bool:
        return not self.data


class KVStorePromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """`vllm:kvstore_*` counters, one of each an engine."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: Mapping[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: Mapping[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make = metric_types[prometheus_client.Counter]
        self._labelled = {
            kind: make(
                name=f"vllm:kvstore_{kind}", documentation=text, labelnames=[*labelnames, label]
            )
            for kind, (text, label) in _METRICS.items()
        }
        self._plain = {
            name: make(name=f"vllm:kvstore_{name}", documentation=text, labelnames=labelnames)
            for name, text in _COUNTERS.items()
        }

    def observe(self, transfer_stats_data: Mapping[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for kind, counter in self._labelled.items():
            for name, number in transfer_stats_data.get(kind, {}).items():
                counter.labels(*labels, name).inc(number)
        for name, number in transfer_stats_data.get(COUNTED, {}).items():
            if name in self._plain:
                self._plain[name].labels(*labels).inc(number)

"""The connector as vLLM makes it, without a model: asked by lines, in vLLM's environment."""

from __future__ import annotations

import logging
import time
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

import kvstore
from benchmarks.workers.lines import serve
from kvstore.connectors.vllm_jobs import Ready, Refused
from kvstore.hashing import TokenChain
from kvstore.identity import Namespace
from kvstore.store import BlockStore

NAMESPACE = Namespace("tiny", "w", "t", "float32", 2, 2, 16, 16, "")
WORKERS = 2
PATIENCE_S = 30.0


class Hearing:
    """What kvstore logs meanwhile."""

    def __enter__(self) -> list[str]:
        self.lines: list[str] = []
        self._log = logging.getLogger("vllm.kvstore")
        self._log.addFilter(self._hear)
        return self.lines

    def __exit__(self, *error: object) -> None:
        self._log.removeFilter(self._hear)

    def _hear(self, record: logging.LogRecord) -> bool:
        self.lines.append(f"{record.levelname} {record.getMessage()}")
        return True


def connector(role: str) -> Any:
    """One of two workers', or their scheduler's; `pool` is what vLLM says of its pages."""
    base: Any = import_module("vllm.distributed.kv_transfer.kv_connector.v1.base")
    interface: Any = import_module("vllm.v1.kv_cache_interface")
    spec = interface.FullAttentionSpec(
        block_size=32, num_kv_heads=1, head_size=16, dtype=torch.float32
    )
    group = SimpleNamespace(kv_cache_spec=spec, layer_names=["0", "1"])
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config={"ram_bytes": "4 MiB", "namespace": NAMESPACE.to_json()},
            kv_load_failure_policy="recompute",
            kv_role="kv_both",
        ),
        parallel_config=SimpleNamespace(
            distributed_executor_backend="uni",
            pipeline_parallel_size=1,
            tensor_parallel_size=WORKERS,
            world_size=WORKERS,
            rank=1,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        model_config=SimpleNamespace(dtype=torch.float32),
        kv_events_config=None,
    )
    made: Any = import_module("kvstore.connectors.vllm").KVStoreConnector(
        config, base.KVConnectorRole[role], SimpleNamespace(kv_cache_groups=[group])
    )
    pool = SimpleNamespace(num_gpu_blocks=10, get_num_free_blocks=lambda: 9)
    made.bind_kv_cache_manager(SimpleNamespace(block_pool=pool))
    return made


def introduced(reasons: list[str | None]) -> dict[str, Any]:
    """What is said when each worker gives a reason not to, or has none."""
    made = connector("SCHEDULER")
    said = [Ready(NAMESPACE.fingerprint) if each is None else Refused(each) for each in reasons]
    with Hearing() as lines:
        made.set_xfer_handshake_metadata_pp_aware({(0, i): each for i, each in enumerate(said)})
    found = {"lines": lines, "works": made._scheduler is not None}
    made.shutdown()
    return found


def refused() -> dict[str, Any]:
    """A worker that is shown KV that it does not know."""
    base: Any = import_module("vllm.distributed.kv_transfer.kv_connector.v1.base")
    made = connector("WORKER")
    with Hearing() as lines:
        made.register_kv_caches({"0": torch.zeros(1, device="meta")})
    said = made.get_handshake_metadata()
    made.shutdown()
    is_vllms = isinstance(said, base.KVConnectorHandshakeMetadata)
    return {"reason": said.reason, "lines": lines, "is_vllms": is_vllms}


def woken() -> list[bool]:
    """Whether what was forgotten stays so when the workers introduce themselves again."""
    made = connector("SCHEDULER")
    said = {(0, i): Ready(NAMESPACE.fingerprint) for i in range(WORKERS)}
    found = []
    for _ in range(2):
        made.set_xfer_handshake_metadata_pp_aware(said)
        found.append(made._scheduler._model == NAMESPACE)
        made.reset_cache()
    made.shutdown()
    return found


def broken() -> dict[str, Any]:
    """What vLLM is told when its requests are not what they were."""
    made = connector("SCHEDULER")
    made.set_xfer_handshake_metadata_pp_aware(
        {(0, i): Ready(NAMESPACE.fingerprint) for i in range(WORKERS)}
    )
    request = SimpleNamespace(request_id="a")
    output = SimpleNamespace(
        num_scheduled_tokens={"a": 1},
        total_num_scheduled_tokens=1,
        preempted_req_ids=None,
        kv_connector_block_state=None,
    )
    with Hearing() as lines:
        made.on_new_request(request)
        found = {
            "matched": made.get_num_new_matched_tokens(request, 0),
            "saves": made.build_connector_meta(output).saves,
            "reset": made.reset_cache(),
            "held": made.request_finished(request, [])[0],
            "lines": lines,
        }
    made.shutdown()
    return found


def fallen_behind() -> list[list[Any]]:
    """Events as they come: kinds, media and how many blocks, where 8 blocks' events are kept."""
    events: Any = import_module("kvstore.connectors.vllm_events")
    with kvstore.open(ram_bytes="4 MiB") as store:
        assert isinstance(store, BlockStore)
        store.feed.start(8)
        heard = events.Events(store.feed, NAMESPACE)
        found: list[Any] = []
        for tokens in (range(64), range(1000, 1192)):
            with store.reserve(TokenChain(NAMESPACE, tokens).chain()) as reservation:
                reservation.commit()
            until_s = time.monotonic() + PATIENCE_S
            while not found or type(found[-1]).__name__ != "BlockStored":
                assert time.monotonic() < until_s
                found += heard.take()
            found.append(None)
        found += heard.take()
        store.evict(TokenChain(NAMESPACE, range(64)).chain())
        found += heard.take()
        heard.close()
    found += heard.take()
    return [
        [type(each).__name__, getattr(each, "medium", None), len(getattr(each, "block_hashes", []))]
        for each in found
        if each is not None
    ]


def build() -> dict[str, Any]:
    return {verb.__name__: verb for verb in (introduced, refused, woken, broken, fallen_behind)}


if __name__ == "__main__":
    serve(build)

"""SGLang's HiCache on the CPU in a process of its own, asked by lines. Runs in its environment.

Real device and host pools, storage factory and controller; only the model is not there. KV is
random numbers, which differ with all tokens before and are the same in every process.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.pool_host.group import HostPoolGroup, PoolEntry
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.runtime_context import get_parallel, reset_context
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from torch import Tensor

from benchmarks.workers.lines import serve

PATIENCE_S = 60
SIZE = 1024  # tokens of a device pool; twice that on the host
CONTROLLERS = {kind.__name__: kind for kind in (HiCacheController, HybridCacheController)}
ALONE = {"pp_rank": 0, "pp_size": 1, "attn_dcp_rank": 0, "attn_dcp_size": 1}

said: list[str] = []


class Said(logging.Handler):
    """Keeps what kvstore logs."""

    def emit(self, record: logging.LogRecord) -> None:
        said.append(record.getMessage())


class Rank:
    """One rank's pools and their controller, which the storage backend is attached to."""

    def __init__(
        self,
        extra: dict[str, Any],
        shape: Sequence[int],
        layout: str = "layer_first",
        page_size: int = 16,
        dtype: str = "bfloat16",
        rank: int = 0,
        ranks: int = 1,
        is_mla: bool = False,
        model_name: str | None = None,
        controller: str = "HybridCacheController",
        failing: float | None = None,
    ) -> None:
        """`shape` is layers, KV heads of the whole model, head size.

        SGLang's servers use the hybrid controller for all models, and decode workers of a
        disaggregated one the other. With `failing` SGLang's own injector fails that share of
        what is asked.
        """
        self._layers, kv_heads, self._head_dim = shape
        held = max(1, kv_heads // ranks)
        first = rank * kv_heads // ranks
        self._kv_heads, self._heads = kv_heads, slice(first, first + held)
        self._dtype = getattr(torch, dtype)
        self._page_size = page_size
        self._host = self._mla(layout) if is_mla else self._mha(layout, held)
        allocator = PagedTokenToKVPoolAllocator(
            SIZE, page_size, self._dtype, "cpu", self._device, need_sort=False
        )
        self._is_hybrid = controller == "HybridCacheController"
        pools = self._host
        if self._is_hybrid:
            anchor = PoolEntry(PoolName.KV, self._host, self._device, int, True)
            pools = HostPoolGroup([anchor])
        with (
            get_parallel().override(tp_rank=rank, tp_size=ranks, **ALONE),
            envs.SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE.override(failing),
        ):
            self._controller: Any = CONTROLLERS[controller](
                allocator,
                pools,
                page_size,
                None,
                threading.Event(),
                io_backend="direct",
                storage_backend="dynamic",
                model_name=model_name,
                storage_backend_extra_config={
                    "backend_name": "kvstore",
                    "module_path": "kvstore.connectors.sglang",
                    "class_name": "KVStoreHiCache",
                    "interface_v1": 1,
                    **extra,
                },
            )
        self._requests = 0

    @property
    def backend(self) -> Any:
        return self._controller.storage_backend

    def _mha(self, layout: str, held: int) -> Any:
        self._device = MHATokenToKVPool(
            size=SIZE,
            page_size=self._page_size,
            dtype=self._dtype,
            head_num=held,
            head_dim=self._head_dim,
            layer_num=self._layers,
            device="cpu",
            enable_memory_saver=False,
        )
        return MHATokenToKVPoolHost(
            self._device.get_device_pool_infos()[0].buffer_info,
            2.0,
            0,
            self._page_size,
            layout,
            pin_memory=False,
            device_capacity_tokens=SIZE,
            start_layer=0,
            end_layer=self._layers,
        )

    def _mla(self, layout: str) -> Any:
        self._device = MLATokenToKVPool(
            size=SIZE,
            page_size=self._page_size,
            dtype=self._dtype,
            kv_lora_rank=32,
            qk_rope_head_dim=16,
            layer_num=self._layers,
            device="cpu",
            enable_memory_saver=False,
        )
        return MLATokenToKVPoolHost(
            self._device.get_device_pool_infos()[0].buffer_info,
            2.0,
            0,
            self._page_size,
            layout,
            pin_memory=False,
            device_capacity_tokens=SIZE,
            start_layer=0,
            end_layer=self._layers,
            target_layer_num=self._layers,
        )

    # ---- what is asked

    def backup(self, tokens: Sequence[int], salt: str | None = None, after: int = 0) -> int:
        """Have computed `tokens`, and back up those from `after` on; how many SGLang counts."""
        keys = self._keys(tokens, salt)
        before = after // self._page_size
        indices = self._host.alloc(len(keys) * self._page_size)
        self._write(indices, self._kv(tokens)[:, :, : len(indices)])
        self._controller.write_storage(
            indices[after:], list(tokens[after:]), keys[before:], keys[:before]
        )
        operation = self._controller.ack_backup_queue.get(timeout=PATIENCE_S)
        self._scrub(indices)
        return int(operation.completed_tokens)

    def prefetch(self, tokens: Sequence[int], salt: str | None = None, after: int = 0) -> list[int]:
        """As for a prompt of which SGLang has the first `after` tokens.

        Returns how many were found, how many came, and how many of these are right bit by bit,
        or -1 where the pool was written outside of them.
        """
        keys = self._keys(tokens, salt)
        before = after // self._page_size
        self._requests += 1
        name = str(self._requests)
        operation = self._controller.prefetch(
            CacheRequestHandle(name, 0) if self._is_hybrid else name,
            RadixKey(array("q", tokens[after : len(keys) * self._page_size]), cache_salt=salt),
            keys[before - 1] if before else None,
            keys[:before],
        )
        self._controller.prefetch_hit_queue.get(timeout=PATIENCE_S)
        found = operation.storage_hit_count
        indices = self._host.alloc(found) if found else torch.empty(0, dtype=torch.int64)
        operation.host_indices = indices
        self._controller.prefetch_buffer.put(operation)
        came = 0
        while True:
            ack = self._controller.ack_prefetch_queue.get(timeout=PATIENCE_S)
            if ack.completed_req:
                break
            came = ack.completed_tokens
        right = self._right(indices, came, self._kv(tokens)[:, :, after : after + came])
        self._scrub(indices)
        return [found, came, right]

    def keys(self, tokens: Sequence[int]) -> list[str]:
        """SGLang's hashes of the pages."""
        return self._keys(tokens, None)

    def exists(self, tokens: Sequence[int]) -> int:
        return int(self.backend.batch_exists(self._keys(tokens, None)))

    def get(self, tokens: Sequence[int], places: Sequence[int]) -> list[bool]:
        """Whatever SGLang thinks is there; `places` are those of tokens."""
        indices = torch.tensor(places)
        came: list[bool] = self.backend.batch_get_v1(self._keys(tokens, None), indices)
        return came

    def put(self, tokens: Sequence[int], places: Sequence[int]) -> list[bool]:
        indices = torch.tensor(places)
        held: list[bool] = self.backend.batch_set_v1(self._keys(tokens, None), indices)
        return held

    def others(self, tokens: Sequence[int]) -> list[object]:
        """What backends are asked that are without interface_v1, or for hybrid models."""
        keys = self._keys(tokens, None)
        transfers = [PoolTransfer(PoolName.MAMBA, keys=keys)]
        hits = self.backend.batch_exists_v2(keys, transfers)
        return [
            self.backend.get(keys[0]),
            self.backend.batch_get(keys),
            self.backend.set(keys[0], torch.zeros(4)),
            self.backend.batch_set(keys, [torch.zeros(4)]),
            hits.kv_hit_pages,
            [any(done) for done in self.backend.batch_get_v2(transfers).values()],
            [any(done) for done in self.backend.batch_set_v2(transfers).values()],
        ]

    def second_pool(self) -> None:
        """As for a hybrid model: a pool beside that of KV."""
        self.backend.register_mem_host_pool_v2(object(), PoolName.MAMBA)

    def counters(self) -> dict[str, int]:
        return dict(self.backend.stats().counters)

    def misses(self) -> dict[str, int]:
        return dict(self.backend.stats().misses)

    def close(self) -> None:
        self._controller.detach_storage_backend()

    # ---- inside

    def _keys(self, tokens: Sequence[int], salt: str | None) -> list[str]:
        """Of full pages: SGLang asks for no others."""
        full = len(tokens) // self._page_size * self._page_size
        key = RadixKey(array("q", tokens[:full]), cache_salt=salt)
        return list(get_storage_hash_str(key, page_size=self._page_size))

    def _kv(self, tokens: Sequence[int]) -> Tensor:
        """What belongs to the tokens: [2, layers, tokens, heads that are held, head size]."""
        seen = hashlib.sha256()
        numbers = []
        for token in tokens:
            seen.update(f"{token} ".encode())
            seed = int.from_bytes(seen.digest()[:7], "little")
            generator = torch.Generator().manual_seed(seed)
            shape = (2, self._layers, self._kv_heads, self._head_dim)
            numbers.append(torch.randn(shape, generator=generator))
        return torch.stack(numbers, 2).to(self._dtype)[:, :, :, self._heads]

    def _views(self) -> list[list[Tensor]]:
        """K and V of each layer: [place, head, element], or [page, token, head, element]."""
        host, layers = self._host, range(self._layers)
        if host.layout == "page_unified":
            return [[host.kv_buffer[:, 0, layer, half] for layer in layers] for half in (0, 1)]
        if host.layout == "page_head":
            halves = (host.k_buffer, host.v_buffer)
            return [[half[..., layer, :].transpose(1, 2) for layer in layers] for half in halves]
        return [host.k_data_refs, host.v_data_refs]  # SGLang's own views

    def _places(self, view: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        if view.dim() == 4:  # [page, token, head, element]
            return indices // self._page_size, indices % self._page_size
        return (indices,)

    def _write(self, indices: Tensor, kv: Tensor) -> None:
        for views, half in zip(self._views(), kv, strict=True):
            for view, layer in zip(views, half, strict=True):
                view[self._places(view, indices)] = layer

    def _right(self, indices: Tensor, came: int, expected: Tensor) -> int:
        rest = self._host.kv_buffer.clone()
        here = indices[:came]
        right = torch.ones(came, dtype=torch.bool)
        for views, half in zip(self._views(), expected, strict=True):
            for view, layer in zip(views, half, strict=True):
                got = view[self._places(view, here)]
                same = got.view(torch.uint8) == layer.contiguous().view(torch.uint8)
                right &= same.flatten(1).all(1)
        self._scrub(here, free=False)
        outside = bool(self._host.kv_buffer.any())
        self._host.kv_buffer.copy_(rest)
        return -1 if outside else int(right.sum())

    def _scrub(self, indices: Tensor, free: bool = True) -> None:
        """Zeros, so that nothing is found but what was loaded."""
        for views in self._views():
            for view in views:
                view[self._places(view, indices)] = 0
        if free and len(indices):
            self._host.free(indices)


class Process:
    """Ranks by name, in one process: what SGLang has in many is simulated."""

    def __init__(self) -> None:
        self._ranks: dict[str, Rank] = {}
        logging.getLogger("sglang.kvstore").addHandler(Said())
        logging.getLogger("kvstore").addHandler(Said())

    def open(self, name: str, **arguments: Any) -> None:
        self._ranks[name] = Rank(**arguments)

    def refused(self, **arguments: Any) -> str:
        """The error of a backend that cannot be made."""
        try:
            Rank(**arguments)
        except Exception as error:
            return repr(error)
        return ""

    def ask(self, name: str, what: str, **arguments: Any) -> Any:
        return getattr(self._ranks[name], what)(**arguments)

    def close(self, name: str) -> None:
        self._ranks.pop(name).close()

    def serve(self, **arguments: Any) -> None:
        """As in a server started with these arguments, from now on; with none as without one."""
        reset_context()
        if arguments:
            set_global_server_args_for_scheduler(ServerArgs(device="cpu", **arguments))

    def said(self) -> list[str]:
        """What kvstore has logged since this was last asked."""
        lines = said.copy()
        said.clear()
        return lines


def build() -> dict[str, Any]:
    process = Process()
    verbs = (
        process.open,
        process.refused,
        process.ask,
        process.serve,
        process.close,
        process.said,
    )
    return {verb.__name__: verb for verb in verbs}


if __name__ == "__main__":
    serve(build)

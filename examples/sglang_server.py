"""SGLang's server with kvstore behind its HiCache.

    python examples/sglang_server.py MODEL CACHE [arguments of SGLang's server]
    python examples/sglang_server.py MODEL CACHE --check

MODEL is a Hugging Face folder, and CACHE a directory for the KV or the address of a daemon
(unix:///..., kvstore://...). `--check` starts no server and needs no GPU: it makes SGLang's host
pool and storage backend with the same settings, stores some pages and loads them back.
"""

from __future__ import annotations

import json
import os
import sys

PAGE_TOKENS = 64
LAYOUT = "page_first"
CHECKED_PAGES = 4


def settings(model: str, cache: str) -> dict[str, object]:
    """What --hicache-storage-backend-extra-config says."""
    own = {"ram_bytes": "1 GiB", "nvme_path": cache, "nvme_bytes": "2 GiB"}
    return {
        "backend_name": "kvstore",
        "module_path": "kvstore.connectors.sglang",
        "class_name": "KVStoreHiCache",
        "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True,
        "model": model,
        **({"url": cache} if "://" in cache else own),
    }


def serve(model: str, cache: str, rest: list[str]) -> None:
    """Become SGLang's server."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
    command += ["--page-size", str(PAGE_TOKENS), "--enable-hierarchical-cache"]
    command += ["--hicache-mem-layout", LAYOUT, "--hicache-storage-backend", "dynamic"]
    command += ["--hicache-storage-backend-extra-config", json.dumps(settings(model, cache))]
    os.execv(sys.executable, [*command, *rest])


def check(model: str, cache: str) -> None:
    """One rank's host pool in plain memory, in the shape of the model's KV."""
    import torch
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
    from sglang.srt.mem_cache.storage import StorageBackendFactory

    import kvstore

    namespace = kvstore.model_namespace(model, dtype="bfloat16")
    tokens = CHECKED_PAGES * PAGE_TOKENS
    device = MHATokenToKVPool(
        size=tokens,
        page_size=PAGE_TOKENS,
        dtype=torch.bfloat16,
        head_num=namespace.kv_heads,
        head_dim=namespace.head_dim,
        layer_num=namespace.layers,
        device="cpu",
        enable_memory_saver=False,
    )
    buffers = device.get_device_pool_infos()[0].buffer_info
    host = MHATokenToKVPoolHost(
        buffers, 2.0, 0, PAGE_TOKENS, LAYOUT,
        pin_memory=False, device_capacity_tokens=tokens, start_layer=0, end_layer=namespace.layers,
    )  # fmt: skip
    config = HiCacheStorageConfig(
        0, 1, 0, 1, 0, 1, False, False, True, model, extra_config=settings(model, cache)
    )
    backend = StorageBackendFactory.create_backend("dynamic", config, host)
    backend.register_mem_pool_host(host)
    pages = [f"a page of the check, {number}" for number in range(CHECKED_PAGES)]
    held = backend.batch_exists(pages)
    places = host.alloc(tokens)
    written = torch.randn(host.kv_buffer.shape, generator=torch.Generator().manual_seed(0))
    host.kv_buffer.copy_(written)
    stored = sum(backend.batch_set_v1(pages, places))
    host.kv_buffer.zero_()
    loaded = sum(backend.batch_get_v1(pages, places))
    right = torch.equal(host.kv_buffer[:, places], written.bfloat16()[:, places])
    backend.close()
    print(f"{held} of {len(pages)} pages were there, {stored} are, {loaded} were loaded")
    sys.exit(0 if right and loaded == len(pages) else "they are not what was stored")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"{__doc__}")
    if sys.argv[3:] == ["--check"]:
        check(*sys.argv[1:3])
    else:
        serve(*sys.argv[1:3], sys.argv[3:])

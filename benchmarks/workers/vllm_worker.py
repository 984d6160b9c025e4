"""vLLM on the CPU, in one process, turn by turn. Runs in vLLM's environment."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from benchmarks.workers.lines import serve


class VllmTurns:
    """One model in vLLM, greedy, its prefix cache off so that every prompt is computed.

    With the url of a daemon, kvstore's connector is between them.
    """

    def __init__(self, folder: str, dtype: str, context_tokens: int, url: str = "") -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # as many as the others have
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        vllm: Any = import_module("vllm")
        connector: dict[str, Any] = {}
        if url:
            connector["kv_transfer_config"] = import_module("vllm.config").KVTransferConfig(
                kv_connector="KVStoreConnector",
                kv_connector_module_path="kvstore.connectors.vllm",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config={"url": url},
            )
        self._params: Any = vllm.SamplingParams
        self._model = vllm.LLM(
            model=folder,
            dtype=dtype,
            max_model_len=context_tokens,
            enforce_eager=True,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            distributed_executor_backend="uni",
            disable_log_stats=False,
            **connector,
        )

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Seconds until each prompt has exactly `tokens` new tokens."""
        params = self._params(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        start = time.perf_counter()
        outputs = self._model.generate(asked, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        if any(len(output.outputs[0].token_ids) != tokens for output in outputs):
            raise RuntimeError("vLLM stopped early")
        return seconds

    def hits(self) -> int:
        """Tokens that came from the connector so far."""
        name = "vllm:external_prefix_cache_hits"
        return sum(int(each.value) for each in self._model.get_metrics() if each.name == name)


def build() -> dict[str, Any]:
    folder, dtype, context_tokens, *url = sys.argv[1:]
    turns = VllmTurns(folder, dtype, int(context_tokens), *url)
    return {
        "generate": turns.generate,
        "hits": turns.hits,
        "threads": import_module("torch").get_num_threads,
    }


if __name__ == "__main__":
    serve(build)

"""vLLM on the CPU in a process of its own, asked by lines. Runs in vLLM's environment."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from benchmarks.workers.lines import serve


class VllmProcess:
    """One model, greedy, with the scheduler in this process, and one worker unless told others."""

    def __init__(self, folder: str, arguments: dict[str, Any], transfer: dict[str, Any]) -> None:
        vllm: Any = import_module("vllm")
        self._params: Any = vllm.SamplingParams
        self._lines: list[str] = []
        self._adapters: dict[str, int] = {}  # numbers by folder
        # A filter, because vLLM takes away handlers when it sets up its own.
        logging.getLogger("vllm.kvstore").addFilter(self._hear)
        if events := arguments.pop("events", None):
            arguments["kv_events_config"] = vllm.config.KVEventsConfig(
                enable_kv_cache_events=True, publisher="zmq", endpoint=events
            )
        if transfer:
            ours = {
                "kv_connector": "KVStoreConnector",
                "kv_connector_module_path": "kvstore.connectors.vllm",
                "kv_role": "kv_both",
            }
            arguments["kv_transfer_config"] = vllm.config.KVTransferConfig(**{**ours, **transfer})
        self._llm = vllm.LLM(
            model=folder,
            skip_tokenizer_init=True,
            enforce_eager=True,
            disable_log_stats=False,
            **{
                "dtype": "float32",
                "max_model_len": 2048,
                "distributed_executor_backend": "uni",
                **arguments,
            },
        )

    @property
    def _core(self) -> Any:
        return self._llm.llm_engine.engine_core.engine_core

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        salts: Sequence[str] = (),
        adapter: str | None = None,
    ) -> list[list[int]]:
        """The new tokens of each prompt, all of them asked for at once; with a LoRA's folder."""
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        for prompt, salt in zip(asked, salts, strict=False):
            prompt["cache_salt"] = salt  # type: ignore[assignment]
        params = self._params(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        lora = None
        if adapter is not None:
            number = self._adapters.setdefault(adapter, len(self._adapters) + 1)
            lora = import_module("vllm.lora.request").LoRARequest(adapter, number, adapter)
        outputs = self._llm.generate(asked, params, use_tqdm=False, lora_request=lora)
        self.settle()
        self.finish_reasons = [output.outputs[0].finish_reason for output in outputs]
        return [list(output.outputs[0].token_ids) for output in outputs]

    def reasons(self) -> list[str]:
        """Why each of the last answers has ended."""
        return self.finish_reasons

    def _hear(self, record: logging.LogRecord) -> bool:
        self._lines.append(record.getMessage())
        return True

    def said(self) -> list[str]:
        """What kvstore has logged, as far as vLLM's level lets it."""
        return self._lines

    def timed(self, prompt: Sequence[int], tokens: int) -> float:
        """Seconds until the prompt has `tokens` new tokens."""
        start_s = time.perf_counter()
        self.generate([prompt], tokens)
        return time.perf_counter() - start_s

    def settle(self) -> None:
        """Step until the pages of all finished requests have been given back."""
        while self._core.scheduler.requests:
            self._llm.llm_engine.step()

    def abort(self, prompt: Sequence[int], steps: int) -> int:
        """Begin with a prompt, drop it after some steps; the requests that are left then."""
        params = self._params(temperature=0.0, max_tokens=64, ignore_eos=True, detokenize=False)
        engine = self._llm.llm_engine
        engine.add_request("dropped", {"prompt_token_ids": list(prompt)}, params)
        for _ in range(steps):
            engine.step()
        engine.abort_request(["dropped"])
        self.settle()
        return len(self._core.scheduler.requests)

    def forget_midway(self, prompt: Sequence[int]) -> bool:
        """Reset all there is when a prompt has been computed, a part of it at least; let it end."""
        params = self._params(temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False)
        engine = self._llm.llm_engine
        engine.add_request("midway", {"prompt_token_ids": list(prompt)}, params)
        while not any(each.num_computed_tokens for each in self._core.scheduler.requests.values()):
            engine.step()
        has_reset = self.reset(connector=True)
        self.settle()
        return has_reset

    def reset(self, connector: bool = False) -> bool:
        """Forget the prefix cache in vLLM's own memory; with `connector`, the store's blocks."""
        return bool(self._llm.reset_prefix_cache(reset_connector=connector))

    def kill_at_load(self, pid: int) -> None:
        """The next time that blocks are to be loaded, that process dies just before."""
        worker: Any = import_module("kvstore.connectors.vllm_worker").Worker
        start_loads = worker.start_loads

        def killing(self: Any, orders: Any) -> None:
            if orders.loads:
                os.kill(pid, signal.SIGKILL)
                worker.start_loads = start_loads
            start_loads(self, orders)

        worker.start_loads = killing

    def preemptions(self) -> float:
        return self.metrics().get("vllm:num_preemptions", 0)

    def metrics(self) -> dict[str, float]:
        """Counters by name and, of ours, by the label that is theirs alone."""
        found: dict[str, float] = {}
        for metric in self._llm.get_metrics():
            if not hasattr(metric, "value"):
                continue
            own = [v for k, v in metric.labels.items() if k in ("tier", "reason")]
            name = " ".join([metric.name, *own])
            found[name] = found.get(name, 0) + metric.value
        return found

    def end(self) -> None:
        """Shut down as vLLM does."""
        self._llm.llm_engine.engine_core.shutdown()


def build() -> dict[str, Any]:
    folder, arguments, transfer = sys.argv[1:]
    process = VllmProcess(folder, json.loads(arguments), json.loads(transfer))
    verbs = ("generate", "reasons", "said", "timed", "abort", "reset", "forget_midway")
    return {verb: getattr(process, verb) for verb in (*verbs, "kill_at_load", "metrics", "end")}


if __name__ == "__main__":
    serve(build)

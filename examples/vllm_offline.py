"""Questions about a text to vLLM, which computes the text once and not in every process.

    python examples/vllm_offline.py MODEL TEXT CACHE

MODEL is a Hugging Face folder or name, TEXT a file, and CACHE a directory for the KV or the
address of a daemon (unix:///...). Start it twice: the second time the text is loaded.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

QUESTIONS = ["What is this text about?", "Who may do what, and on which conditions?"]


def transfer_config(cache: str) -> KVTransferConfig:
    own = {"ram_bytes": "256 MiB", "nvme_path": cache, "nvme_bytes": "2 GiB"}
    return KVTransferConfig(
        kv_connector="KVStoreConnector",
        kv_connector_module_path="kvstore.connectors.vllm",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"url": cache} if "://" in cache else own,
    )


def main(model: str, text: str, cache: str) -> None:
    # A store of this process's own needs vLLM's scheduler and worker to be in it, too.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    llm = LLM(
        model,
        max_model_len=4096,
        kv_transfer_config=transfer_config(cache),
        distributed_executor_backend="uni",
        disable_log_stats=False,
    )
    passage = Path(text).read_text()
    asked = [[{"role": "user", "content": f"{passage}\n\n{question}"}] for question in QUESTIONS]
    outputs = llm.chat(asked, SamplingParams(temperature=0, max_tokens=48), use_tqdm=False)
    for question, output in zip(QUESTIONS, outputs, strict=True):
        print(f"{question}\n  {output.outputs[0].text.strip()}")
    counted = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    prompts = sum(len(output.prompt_token_ids or ()) for output in outputs)
    loaded = counted.get("vllm:external_prefix_cache_hits", 0)
    print(f"{loaded} of {prompts} tokens were loaded from the store")
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"{__doc__}")
    main(*sys.argv[1:])

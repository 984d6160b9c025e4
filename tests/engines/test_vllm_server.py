"""vLLM's OpenAI server with a daemon: scheduler and worker are processes, as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.servers import free_port
from benchmarks.workers.lines import ROOT
from tests.daemon.doors import DaemonProcess
from tests.engines.conftest import VLLM_ENVIRONMENT

pytestmark = pytest.mark.engines

START_S = 240.0


class Server:
    """Asked over HTTP."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, body: Any = None) -> str:
        """GET, or POST with a body. Raises OSError where nobody answers."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            said: str = answer.read().decode()
            return said

    def complete(self, prompt: list[int]) -> str:
        body = {"model": "smollm2", "prompt": prompt, "max_tokens": 12, "temperature": 0}
        text: str = json.loads(self.get("/v1/completions", body))["choices"][0]["text"]
        return text

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@contextmanager
def serving(python: Path, folder: Path, log: Path, *arguments: str) -> Iterator[Server]:
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--served-model-name", "smollm2", "--port", str(port), "--max-model-len", "1024"]
    command += ["--enforce-eager", "--dtype", "float32", *arguments]
    own = {name: VLLM_ENVIRONMENT[name] for name in VLLM_ENVIRONMENT if "MULTIPROC" not in name}
    env = {**os.environ, **own, "PYTHONPATH": str(ROOT), "VLLM_SERVER_DEV_MODE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(list(map(str, command)), env=env, stdout=out, stderr=out)
    server = Server(port)
    until_s = time.monotonic() + START_S
    try:
        while True:
            try:
                server.get("/health")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until_s:
                    pytest.fail(f"the server does not start: {log.read_text()[-2000:]}")
                process_ended(process, 0.2)
        yield server
    finally:
        process.terminate()
        if not process_ended(process, 60):
            process.kill()
            process.wait()


def process_ended(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_the_server_loads_what_it_had_before(
    vllm_python: Path, model_folder: Path, tmp_path: Path, text: list[int]
) -> None:
    prompt = text[:400]  # 25 blocks, of which the last token is computed
    with DaemonProcess(tmp_path, "--ram-bytes", "256 MiB") as daemon:
        config = {
            "kv_connector": "KVStoreConnector",
            "kv_connector_module_path": "kvstore.connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"url": daemon.url},
        }
        arguments = ("--kv-transfer-config", json.dumps(config))
        with serving(vllm_python, model_folder, tmp_path / "vllm.log", *arguments) as server:
            cold = server.complete(prompt)
            assert server.metric("vllm:external_prefix_cache_hits_total") == 0
            server.get("/reset_prefix_cache", {})
            assert server.complete(prompt) == cold
            assert server.metric("vllm:external_prefix_cache_hits_total") == 399
            assert server.metric("vllm:kvstore_loaded_tokens_total") == 399
            assert server.metric("vllm:kvstore_saved_blocks_total") == 25
            assert "running without it" not in (tmp_path / "vllm.log").read_text()

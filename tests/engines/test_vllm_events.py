"""KV events that vLLM publishes: the store's are among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

import kvstore
from kvstore.hashing import TokenChain
from tests.engines.conftest import Vllm

pytestmark = pytest.mark.engines

PATIENCE_MS = 1_000


def test_blocks_of_the_store_are_published_by_vllm(
    vllm: Vllm, text: list[int], model_folder: Path, tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path / 'events'}"
    namespace = kvstore.model_namespace(model_folder, dtype="float32")
    prompts: list[list[int]] = []
    stored: list[dict[str, Any]] = []
    with (
        zmq.Context() as context,
        context.socket(zmq.SUB) as socket,
        vllm({"ram_bytes": "64 MiB"}, events=endpoint) as engine,
    ):
        socket.subscribe(b"")
        socket.connect(endpoint)
        while not stored and len(prompts) < 20:  # what was published before it had joined is lost
            prompts.append(text[len(prompts) :][:100])
            engine.ask("generate", prompts=prompts[-1:], tokens=1)
            stored = [each for each in _events(socket) if each["medium"] == "CPU"]
    keys = [list(TokenChain(namespace, prompt).chain(0, 6).keys) for prompt in prompts]
    assert stored[0]["type"] == "BlockStored"
    assert stored[0]["block_size"] == 16
    assert stored[0]["block_hashes"] in keys


def _events(socket: zmq.Socket[bytes]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    while socket.poll(PATIENCE_MS):
        _, _, payload = socket.recv_multipart()
        events += msgspec.msgpack.decode(payload)[1]
    return events

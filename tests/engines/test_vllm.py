"""vLLM with and without the connector: the same greedy tokens, and prompts that are not computed.

In float32, because greedy tokens are then the same for every way of cutting a prompt.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvstore
from benchmarks.workers.lines import Worker
from kvstore.hashing import Chain, TokenChain
from kvstore.store import BlockStore
from tests.daemon.doors import Daemon, DaemonProcess
from tests.engines.conftest import Vllm

pytestmark = pytest.mark.engines

NEW = 12
RAM = "256 MiB"
HITS = "vllm:external_prefix_cache_hits"


@pytest.fixture(scope="module")
def prompts(text: list[int]) -> list[list[int]]:
    """Three, of which the first two begin with the same 200 tokens."""
    return [text[:330], text[:200] + text[700:790], text[1000:1150]]


# The second prompt, asked for with the first, may find what that one has just stored, or not.
FROM_EACH_OTHER = (0, 192)


@pytest.fixture(scope="module")
def cold(vllm: Vllm, prompts: list[list[int]]) -> list[list[int]]:
    """What vLLM alone answers."""
    with vllm(block_size=128, enable_prefix_caching=False) as engine:
        answers: list[list[int]] = engine.ask("generate", prompts=prompts, tokens=NEW)
        return answers


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """Over a store in this process, which looks at the checksum of all that it gives out."""
    with (
        kvstore.open(ram_bytes=RAM, store_verify="always") as store,
        Daemon(store, tmp_path / "kvstore.sock") as daemon,
    ):
        yield daemon


def full(prompts: list[list[int]]) -> list[int]:
    """Tokens of each prompt that a load can bring: full blocks, but not the last token."""
    return [(len(prompt) - 1) // 16 * 16 for prompt in prompts]


def hits(engine: Worker) -> int:
    return int(engine.ask("metrics").get(HITS, 0))


def chain_of(folder: Path, tokens: list[int]) -> Chain:
    """As kvstore's own engine names it."""
    return TokenChain(kvstore.model_namespace(folder, dtype="float32"), tokens).chain()


def overwrite(store: BlockStore, chain: Chain) -> None:
    """Zeros into the blocks' memory, behind the store's back."""
    with store.acquire(chain) as lease:
        assert lease.wait() == len(chain)
        for view in lease.views:
            address = np.frombuffer(view, np.uint8).ctypes.data
            ctypes.memset(address, 0, len(view))


@pytest.mark.parametrize(("block_size", "prefix_caching"), [(32, True), (128, False)])
def test_what_one_process_has_computed_another_loads(
    block_size: int,
    prefix_caching: bool,
    vllm: Vllm,
    daemon: Daemon,
    model_folder: Path,
    prompts: list[list[int]],
    cold: list[list[int]],
) -> None:
    extra = {"url": daemon.url}
    arguments = {"block_size": block_size, "enable_prefix_caching": prefix_caching}
    with vllm(extra, max_num_batched_tokens=128, **arguments) as engine:  # chunked prefill
        assert engine.ask("generate", prompts=prompts, tokens=NEW) == cold
        assert hits(engine) in FROM_EACH_OTHER
    held = [daemon.store.probe(chain_of(model_folder, prompt)).prefix for prompt in prompts]
    assert held == [len(prompt) // 16 for prompt in prompts]

    with vllm(extra, **arguments) as engine:
        assert engine.ask("generate", prompts=prompts, tokens=NEW) == cold
        assert hits(engine) == sum(full(prompts))
        assert engine.ask("reset")
        assert engine.ask("generate", prompts=prompts, tokens=NEW) == cold
        assert hits(engine) == 2 * sum(full(prompts))
        # Of the second, vLLM may have the beginning itself: six pages, after the first prompt.
        assert engine.ask("reset")
        assert engine.ask("generate", prompts=prompts[:1], tokens=NEW) == cold[:1]
        before = hits(engine)
        assert engine.ask("generate", prompts=prompts[1:2], tokens=NEW) == cold[1:2]
        assert hits(engine) == before + full(prompts)[1] - (192 if prefix_caching else 0)
        # One dropped while it is loaded, and one while it is computed.
        for steps in (1, 3):
            assert engine.ask("reset")
            assert engine.ask("abort", prompt=prompts[0], steps=steps) == 0
        assert engine.ask("reset")
        before = hits(engine)
        assert engine.ask("generate", prompts=prompts, tokens=NEW) == cold
        assert hits(engine) == before + sum(full(prompts))

        # What was damaged is computed, the rest is loaded; what was zeroed is loaded as it is.
        assert engine.ask("reset")
        chain = chain_of(model_folder, prompts[0])
        overwrite(daemon.store, chain.slice(4, 5))
        assert engine.ask("generate", prompts=prompts, tokens=NEW) == cold
        assert engine.ask("metrics")["vllm:kvstore_missed_blocks checksum"] > 0
        assert engine.ask("reset")
        daemon.store.evict(chain)
        with daemon.store.reserve(chain) as reservation:
            for view in reservation.views:
                view[:] = bytes(len(view))
            reservation.commit()
        assert engine.ask("generate", prompts=prompts[:1], tokens=NEW) != cold[:1]

        # Neither another salt nor one who wants to forget finds any of it.
        assert engine.ask("reset")
        before = hits(engine)
        salts = ["theirs"] * 3
        assert engine.ask("generate", prompts=prompts, tokens=NEW, salts=salts) == cold
        assert hits(engine) - before in FROM_EACH_OTHER
        assert engine.ask("reset", connector=True)
        before = hits(engine)
        assert engine.ask("generate", prompts=prompts, tokens=NEW) == cold
        assert hits(engine) - before in FROM_EACH_OTHER
        # What was under way then has pages from before, and is not stored.
        assert engine.ask("reset", connector=True)
        assert not engine.ask("forget_midway", prompt=prompts[0])
        assert engine.ask("reset")
        before = hits(engine)
        assert engine.ask("generate", prompts=prompts[:1], tokens=NEW) == cold[:1]
        assert hits(engine) == before


def test_a_daemon_that_dies_while_it_is_loaded_from(
    vllm: Vllm, tmp_path: Path, prompts: list[list[int]], cold: list[list[int]]
) -> None:
    with (
        DaemonProcess(tmp_path, "--ram-bytes", RAM) as daemon,
        vllm({"url": daemon.url}) as engine,
    ):
        assert engine.ask("generate", prompts=prompts, tokens=NEW) == cold
        assert engine.ask("reset")
        engine.ask("kill_at_load", pid=daemon.pid)
        assert engine.ask("generate", prompts=prompts, tokens=NEW) == cold
        assert engine.ask("reasons") == ["length"] * 3
        daemon.process.wait()
        assert engine.ask("reset")
        assert engine.ask("generate", prompts=prompts, tokens=NEW) == cold
        with DaemonProcess(tmp_path, "--ram-bytes", RAM):
            before = hits(engine)
            for _ in range(20):  # it is found again with a back-off
                assert engine.ask("reset")
                assert engine.ask("generate", prompts=prompts, tokens=NEW) == cold
                if hits(engine) > before:
                    break
            assert hits(engine) > before


def test_a_store_of_its_own_survives_it_and_pages_run_out(
    vllm: Vllm, tmp_path: Path, prompts: list[list[int]], cold: list[list[int]]
) -> None:
    own = {"ram_bytes": RAM, "nvme_path": str(tmp_path / "nvme"), "nvme_bytes": "1 GiB"}
    # 22 pages of 32 tokens hold two of the prompts, but not what they grow to.
    tight = {"block_size": 32, "num_gpu_blocks_override": 23, "enable_prefix_caching": False}
    long = 60
    with vllm(own, max_model_len=512, **tight) as engine:
        answers = engine.ask("generate", prompts=prompts, tokens=long)
        assert [answer[:NEW] for answer in answers] == cold
        assert engine.ask("metrics")["vllm:num_preemptions"] > 0
    with vllm(own, max_model_len=512, **tight) as engine:
        assert engine.ask("generate", prompts=prompts, tokens=long) == answers
        assert hits(engine) >= sum(full(prompts))
        loaded = engine.ask("metrics")
        assert loaded["vllm:kvstore_loaded_tokens ram"] >= sum(full(prompts))

"""The engine over a daemon elsewhere: the same answers, and every token accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvstore.client.client import StoreClient
from kvstore.engine.loading import LoadedModel, load
from tests.daemon.data_doors import DataDaemon
from tests.engine.tiny import tiny_model
from tests.kill.worker import GREEDY, engine_over
from tests.kill.workload import PROMPTS
from tests.store.rig import Rig, RunningClock


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    path = tiny_model(tmp_path / "tiny", num_key_value_heads=4, head_dim=64)
    return load(path, torch.float32)


@pytest.fixture
def elsewhere() -> Iterator[StoreClient]:
    rig = Rig(None, ram_blocks=2048, clock=RunningClock())
    with DataDaemon(rig.store) as daemon, daemon.connect() as client:
        yield client
    rig.finish()


def test_what_a_daemon_elsewhere_has_is_loaded_and_not_computed(
    model: LoadedModel, elsewhere: StoreClient
) -> None:
    prompts = PROMPTS[:3]
    with engine_over(model, None) as engine:
        right = [engine.generate([prompt], GREEDY)[0].token_ids for prompt in prompts]
    with engine_over(model, elsewhere) as engine:
        for _ in range(2):
            outputs = [engine.generate([prompt], GREEDY)[0] for prompt in prompts]
            engine.clear_hbm()
            assert [output.token_ids for output in outputs] == right
    for usage in [output.usage for output in outputs]:
        assert (usage.ram_tokens, usage.nvme_tokens) == (0, 0)
        served = usage.hbm_tokens + usage.remote_tokens + usage.recomputed_tokens
        assert served == usage.prompt_tokens
    assert sum(output.usage.remote_tokens for output in outputs) > 0
    assert elsewhere.load_costs["remote"].observations > 0

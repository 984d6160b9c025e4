"""As `victim`, with an engine over the daemon: its answers are those of one without a cache."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import torch

from kvstore.compose import connect
from kvstore.engine.loading import LoadedModel, load
from tests.daemon.victim import serve
from tests.engine.reference import sources
from tests.engine.tiny import tiny_model
from tests.kill.worker import GREEDY, engine_over
from tests.kill.workload import PROMPTS


def child(model: LoadedModel, url: str, seed: str, answers: str) -> None:
    """Answer prompts, each by itself: what is loaded and what is computed give the same bits."""
    status = 1
    try:
        random = Random(int(seed))
        asked = [random.randrange(len(PROMPTS)) for _ in range(int(answers))]
        with engine_over(model, None) as engine:
            right = {
                number: engine.generate([PROMPTS[number]], GREEDY)[0].token_ids
                for number in set(asked)
            }
        loaded_tokens = 0
        with connect(url) as store, engine_over(model, store) as engine:
            for number in asked:
                (output,) = engine.generate([PROMPTS[number]], GREEDY)
                assert output.token_ids == right[number]
                _, ram_tokens, nvme_tokens, _, _ = sources(output.usage)
                loaded_tokens += ram_tokens + nvme_tokens
                engine.clear_hbm()
            assert store.is_connected
        assert loaded_tokens > 0
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        path = tiny_model(Path(folder) / "tiny", num_key_value_heads=4, head_dim=64)
        model = load(path, torch.float32)
    serve(lambda url, seed, answers, state: child(model, url, seed, answers))


if __name__ == "__main__":
    main()

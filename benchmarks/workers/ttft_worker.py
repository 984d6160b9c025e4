"""An engine over a store on an NVMe directory, in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.workers.lines import serve

WARM_UP_SEED = 1 << 40  # of no prompt that is measured


def build() -> dict[str, Any]:
    import kvstore
    from benchmarks import generation
    from kvstore.engine.sampling import SamplingParams

    directory, source = Path(sys.argv[1]), Path(sys.argv[2])
    store = kvstore.open(ram_bytes="512 MiB", nvme_path=directory, nvme_bytes="2 GiB")
    engine = kvstore.Engine.from_pretrained(
        source, store=store, dtype="bfloat16", hbm_bytes="256 MiB"
    )

    def warm_up(tokens: int) -> None:
        """Generate from a prompt that nothing is measured on, for what the first time costs."""
        generation.by_engine(engine)(generation.prompts(1, tokens, seed=WARM_UP_SEED), 2)

    def answer(prompt: list[int]) -> dict[str, Any]:
        (output,) = engine.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
        return {"token": output.token_ids[0], **output.usage.to_dict()}

    def clear_hbm() -> int:
        store.flush()
        return engine.clear_hbm()

    def close() -> None:
        engine.close()
        store.close()

    return {"warm_up": warm_up, "answer": answer, "clear_hbm": clear_hbm, "close": close}


if __name__ == "__main__":
    serve(build)
